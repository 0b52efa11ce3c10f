"""The values that pass from stage to stage, each with what the next one needs to stay honest.

per-sample gradients ─▶ ClippedSum (carries its sensitivity) ─▶ NoisyGradient (carries its event)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from accountants import Event

__all__ = ["ClippedSum", "NoisyGradient"]


@dataclass(frozen=True, kw_only=True)
class ClippedSum:
    """The sum of clipped per-sample gradients over one logical batch (not yet private).

    Attributes:
        tensors: parameter name to the sum, shaped as the parameter, in the accumulation dtype.
        sensitivity: the L2 norm by which the whole of `tensors` can move when one example is
            added or removed; the unit is that of the gradient.
        examples: examples summed. Private: it is the realised batch size.
        clipped: examples whose gradient was scaled down. Private.
        non_finite: examples left out for a NaN or infinite gradient. Private.
    """

    tensors: dict[str, Tensor]
    sensitivity: float
    examples: int
    clipped: int
    non_finite: int


@dataclass(frozen=True, kw_only=True)
class NoisyGradient:
    """A clipped sum with its noise: what may leave the private side.

    Attributes:
        tensors: parameter name to the noisy sum, shaped as the parameter, before averaging.
        event: the mechanism that made it, without the sampling that chose the batch.
    """

    tensors: dict[str, Tensor]
    event: Event
