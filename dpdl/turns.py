"""Whose turn it is: the loader hands out a batch, the model takes it, the optimizer closes it.

    loader: open(part) ─▶ model: take(n) ─▶ backward: deliver(part, passage) ─▶ optimizer: close()

A logical batch (one noise draw) comes in one or more physical parts. A part may go through the model and through
backward several times: what comes back is collected, and is summed for each example, clipped and added up over
examples when the part is closed. The sums of its parts leave as one `ClippedSum` when the last part is closed. A
call out of order is refused, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpdl.errors import StepError
from dpdl.per_sample.boundary import Passage, visit_gradients
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
        passages: forward passes over it that a backward has come back through.
        dropped: whether zero_grad() has dropped what an earlier backward brought.
        closed: whether the optimizer has taken its gradients.
    """

    size: int
    last: bool
    passages: list[Passage] = field(default_factory=list)
    dropped: bool = False
    closed: bool = False

    @property
    def delivered(self) -> bool:
        """Whether there is something to step on."""
        return bool(self.passages)


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
        self._at_backward: Callable[[], None] = lambda: None

    def at_backward(self, call: Callable[[], None]) -> None:
        """Let `call` be called at each backward."""
        self._at_backward = call

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
        self.drop()
        self._part = None
        self._sums = _Sums()

    @property
    def open_part(self) -> Part | None:
        """The part that waits for its forwards, backwards or step; None between batches."""
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

    def deliver(self, part: Part, passage: Passage) -> None:
        """A backward has come through `passage`, a forward pass over `part`. What it brings is clipped at `close`.

        Raises:
            StepError: `part` is not the open one, or the passage cannot be added to it.
        """
        if part is not self.open_part:
            raise StepError(
                "backward() was called on a loss of an earlier batch, whose step is over. Call backward() "
                "before optimizer.step(), and keep no loss for later."
            )
        if passage.is_used_up:
            raise StepError(
                "backward() was called on an output whose gradients were taken by an optimizer.step() that then "
                "failed. Call the private model on the current batch again."
            )
        if part.passages and part.passages[0].trainable != passage.trainable:
            raise StepError(
                "Parameters were frozen or unfrozen between two forward passes over the current batch: "
                f"{sorted(part.passages[0].trainable ^ passage.trainable)}. Do that between steps."
            )
        if not any(known is passage for known in part.passages):
            part.passages.append(passage)
        self._at_backward()

    def drop(self) -> None:
        """Drop what backwards have brought for the open part; its forwards, and parts closed before, are kept."""
        part = self.open_part
        if part is None:
            return
        for passage in part.passages:
            passage.forget()
        part.dropped = part.dropped or part.delivered
        part.passages.clear()

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
        if part.size and not part.delivered and part.dropped:
            raise StepError(
                f"optimizer.step() after zero_grad(): it dropped what backward() had brought for the current batch "
                f"of {part.size} examples. Call zero_grad() before backward(), and backward() again before step()."
            )
        if part.size and not part.delivered:
            raise StepError(
                f"optimizer.step() before backward(): the current batch of {part.size} examples has brought no "
                "gradients. Call the private model on the batch, and backward() on a loss of its output."
            )

    def close(self, *, loss_scale: float = 1.0) -> ClippedSum | None:
        """Clip and add up what the open part's backwards have brought, and close it.

        The gradient that is clipped is that of one example, summed over all forward passes and backwards. If
        computing it fails, the part stays open, to be run forward and backward again.

        Args:
            loss_scale: what all losses were multiplied by, to be taken out before clipping.

        Returns:
            The sum over the logical batch if that is complete, else None.
        """
        self.refuse_unready()
        part = self.open_part
        assert part is not None
        passages = part.passages[:]
        part.passages.clear()  # also if what follows fails: a pass can be gone back through once
        found = self._clipped(passages, loss_scale)
        _add(self._sums.tensors, found.tensors)
        self._sums.examples += part.size
        self._sums.clipped += found.clipped
        self._sums.non_finite += found.non_finite
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

    def _clipped(self, passages: list[Passage], loss_scale: float) -> _Sums:
        """The sum over examples of clipped gradients."""
        found = _Sums()

        def add(piece: PerSampleGradients) -> None:
            norms = piece.norms()
            weights = self._clip(norms)
            found.non_finite += int((~torch.isfinite(norms)).sum())
            found.clipped += int(((weights > 0) & (weights < 1)).sum())
            _add(found.tensors, piece.weighted_sum(weights))

        visit_gradients(passages, add, loss_scale=loss_scale)
        return found


def _add(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, tensor in more.items():
        sums[name] = sums[name] + tensor if name in sums else tensor
