"""Whose turn it is: the loader hands out a batch, the model takes it, the optimizer closes it.

    loader: open(part) ─▶ model: take(n) ─▶ backward: deliver(part, gradients) ─▶ optimizer: close()

A logical batch (one noise draw) comes in one or more physical parts (one forward pass each). Clipped
gradients of its parts are added up here, and leave as one `ClippedSum` when the last part is closed. A
call out of order is refused, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpdl.errors import StepError
from dpdl.per_sample.engine import PerSampleGradients
from dpdl.types import ClippedSum

__all__ = ["Part", "Turns"]

Clip = Callable[[Tensor], Tensor]


@dataclass(eq=False, kw_only=True)
class Part:
    """A physical part of a logical batch, as the loader handed it out.

    Attributes:
        size: examples in it; may be 0.
        last: whether it completes its logical batch.
        delivered: whether its gradients have come back.
        closed: whether the optimizer has taken them.
    """

    size: int
    last: bool
    delivered: bool = False
    closed: bool = False


@dataclass(kw_only=True)
class _Sums:
    """What the parts of the open logical batch add up to so far."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    examples: int = 0
    clipped: int = 0
    non_finite: int = 0


class Turns:
    """Keeps loader, model and optimizer of one private run in step.

    Args:
        clip: norms [n] to weights [n] in [0, 1].
        sensitivity: what `clip` guarantees for the sum.
    """

    def __init__(self, *, clip: Clip, sensitivity: float) -> None:
        self._clip = clip
        self._sensitivity = sensitivity
        self._part: Part | None = None
        self._sums = _Sums()

    def open(self, *, size: int, last: bool) -> None:
        """The loader is about to hand out a part.

        Raises:
            StepError: the part before it was not closed by `optimizer.step()`.
        """
        self.refuse_unclosed()
        self._part = Part(size=size, last=last)

    def refuse_unclosed(self) -> None:
        """Raise if the part that was handed out last has not been stepped on."""
        if self._part is not None and not self._part.closed:
            raise StepError(
                f"The last batch of the private loader ({self._part.size} examples) was not followed by "
                "optimizer.step(). Call it once for each batch: skipping batches, or accumulating over "
                "several, is not what the plan accounts for. For larger batches raise expected_batch_size; "
                "for less memory set Execution(max_physical_batch_size=...)."
            )

    def abandon(self) -> None:
        """Forget a logical batch that was not completed; nothing of it was released."""
        self._part = None
        self._sums = _Sums()

    @property
    def open_part(self) -> Part | None:
        """The part that waits for its forward, backward or step; None between batches."""
        return None if self._part is None or self._part.closed else self._part

    def take(self, size: int) -> Part:
        """The open part, for a forward pass over `size` examples.

        Raises:
            StepError: no part is open, or it has another size.
        """
        part = self.open_part
        if part is None:
            raise StepError(
                f"The private model was given {size} examples outside of a private batch. Train on batches "
                "that the private loader yields, one optimizer.step() each; to evaluate, use torch.no_grad()."
            )
        if part.size != size:
            raise StepError(
                f"The private model was given {size} examples, but the private loader's current batch has "
                f"{part.size}. Only that batch, whole, may be trained on; to evaluate, use torch.no_grad()."
            )
        return part

    def deliver(self, part: Part, gradients: Iterator[PerSampleGradients]) -> None:
        """Clip and add up the per-sample gradients that a backward pass brought for `part`.

        Raises:
            StepError: `part` is not the open one, or has been through a backward pass before.
        """
        if part is not self.open_part:
            raise StepError(
                "backward() was called on a loss of an earlier batch, whose step is over. Call backward() "
                "before optimizer.step(), and keep no loss for later."
            )
        if part.delivered:
            raise StepError(
                "The current batch went through backward() twice, which would count its examples twice. Call "
                "the private model once for each batch, add up all losses, and call backward() once."
            )
        found = _Sums(examples=part.size)
        for piece in gradients:
            norms = piece.norms()
            weights = self._clip(norms)
            found.non_finite += int((~torch.isfinite(norms)).sum())
            found.clipped += int(((weights > 0) & (weights < 1)).sum())
            _add(found.tensors, piece.weighted_sum(weights))
        _add(self._sums.tensors, found.tensors)
        self._sums.examples += found.examples
        self._sums.clipped += found.clipped
        self._sums.non_finite += found.non_finite
        part.delivered = True

    def refuse_unready(self) -> None:
        """Raise unless the open part can be closed.

        Raises:
            StepError: no part is open, or its backward is missing.
        """
        part = self.open_part
        if part is None:
            raise StepError(
                "optimizer.step() without a private batch: each batch of the private loader is good for one "
                "step. Iterate over the loader that make_private returned."
            )
        if part.size and not part.delivered:
            raise StepError(
                f"optimizer.step() before backward(): the current batch of {part.size} examples has brought no "
                "gradients. Call the private model on the batch, and backward() on a loss of its output."
            )

    def close(self) -> ClippedSum | None:
        """Close the open part; the sum over the logical batch if it is complete, else None."""
        self.refuse_unready()
        part = self.open_part
        assert part is not None
        part.closed = True
        if not part.last:
            return None
        sums, self._sums = self._sums, _Sums()
        return ClippedSum(
            tensors=sums.tensors,
            sensitivity=self._sensitivity,
            examples=sums.examples,
            clipped=sums.clipped,
            non_finite=sums.non_finite,
        )


def _add(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, tensor in more.items():
        sums[name] = sums[name] + tensor if name in sums else tensor
