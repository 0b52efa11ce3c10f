"""Which axis carries the examples in each call that involves parameters: measured, and looked up while recording."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dpdl.per_sample.tape.batch_axis import BatchAxis

__all__ = ["CallPlan", "Plan"]


@dataclass(frozen=True, kw_only=True)
class CallPlan:
    """What was measured of one call.

    Attributes:
        operands: for each tensor among the arguments, its number of axes and where it carries the examples
            (None: nowhere).
        outputs: where each tensor of the output carries the examples.
        trouble: why examples cannot be told apart in this call; empty if they can.
    """

    operands: tuple[tuple[int, BatchAxis | None], ...]
    outputs: tuple[BatchAxis | None, ...]
    trouble: str = ""

    def fits(self, tensors: list[Tensor], examples: int) -> bool:
        """Whether the call's tensors have the measured form."""
        if len(tensors) != len(self.operands):
            return False
        for tensor, (ndim, axis) in zip(tensors, self.operands, strict=True):
            if tensor.ndim != ndim or (axis is not None and not axis.fits(tensor, examples)):
                return False
        return True

    @property
    def takes_examples(self) -> bool:
        """Whether any operand carries examples."""
        return any(axis is not None for _, axis in self.operands)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a model's forward, for one form of arguments.

    Attributes:
        calls: by their names.
        recomputes: whether parts of the forward run again during the backward (activation checkpointing).
        hidden: whether parameters are used where gradients are off: unless they are meant as constants there, those
            parts run again with gradients on (reentrant checkpointing).
        trouble: why examples cannot be told apart in the model as a whole; empty if they can.
    """

    calls: Mapping[Hashable, CallPlan] = field(default_factory=dict)
    recomputes: bool = False
    hidden: bool = False
    trouble: str = ""
