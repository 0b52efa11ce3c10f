"""Which batch of a facade run is open, and what it counts for.

    loader: open(size, last) ─▶ module: backward brings gradients of that batch ─▶ optimizer.step(): closed

`dpdl.turns` does this for `dpdl.make_private`. Scripts written for Opacus take more freedom (gradients of several
batches in one step, `p.grad_sample` edited by the script), which this allows where it can be accounted for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from dpdl.errors import PrivacyWarning, StepError

__all__ = ["Part", "Turn"]


@dataclass(eq=False, kw_only=True)
class Part:
    """A physical batch that the loader handed out.

    Attributes:
        size: examples in it.
        last: whether it completes its logical batch.
        number_of_pass: the pass over the data that it belongs to.
        closed: whether a step has used it.
        went_backward: whether a backward has come for it.
    """

    size: int
    last: bool
    number_of_pass: int
    closed: bool = False
    went_backward: bool = False


class Turn:
    """Keeps loader, module and optimizer of one run in step.

    Args:
        held: ids of the parameters that the optimizer holds.
        drop_partial: lets the optimizer forget a logical batch that was not completed.
    """

    def __init__(self, *, held: set[int], drop_partial: Callable[[], None]) -> None:
        self.held = held
        self.part: Part | None = None
        self.passes = 0
        self._drop_partial = drop_partial
        self._stepped_in_pass = False
        self._warned = False
        self._incomplete = False

    @property
    def size(self) -> int | None:
        """Examples in the open batch; None if there is none."""
        return None if self.part is None else self.part.size

    def begin_pass(self) -> int:
        """Another pass over the data begins, and gets a number; a logical batch that is half done is dropped."""
        self.passes += 1
        self._stepped_in_pass = False
        self.part = None
        if self._incomplete:
            self._incomplete = False
            self._drop_partial()
        return self.passes

    def open(self, *, size: int, last: bool, of_pass: int) -> None:
        """The loader is about to hand out a batch.

        Raises:
            StepError: the one before was empty, and was skipped; or another pass has begun since this one did.
        """
        if of_pass != self.passes:
            raise StepError(
                "Another pass over the private loader has begun: in two at once an example may be twice, of which one "
                "would be counted. Use one iterator at a time."
            )
        before = self.part
        if before is not None and not before.closed and not before.went_backward:
            self._was_skipped(before)
        self.part = Part(size=size, last=last, number_of_pass=self.passes)
        self._incomplete = self._incomplete or not last

    def close(self) -> None:
        """A step has used the open batch."""
        if self.part is not None:
            self.part.closed = True
            self._incomplete = not self.part.last
        self._stepped_in_pass = True

    def refuse_foreign(self, size: int, part: Part | None) -> None:
        """Raise unless gradients of `size` examples can be those of the open batch.

        Raises:
            StepError: no batch is open, another one is, it was stepped on, or it has another size.
        """
        if self.part is None or part is not self.part:
            raise StepError(
                f"backward() was called for {size} examples outside of a private batch, or for an earlier one. Train "
                "on batches of the loader that make_private returned, one after another; to evaluate, use "
                "torch.no_grad()."
            )
        if self.part.closed:
            raise StepError(
                f"backward() was called again for a batch ({size} examples) that a step has used. A batch is drawn for "
                "one release: take the loader's next one."
            )
        if size != self.part.size:
            raise StepError(
                f"backward() was called for {size} examples, but the private loader's current batch has "
                f"{self.part.size}. Only that batch, whole, may be trained on; to evaluate, use torch.no_grad()."
            )
        self.part.went_backward = True

    def _was_skipped(self, part: Part) -> None:
        if part.size == 0 and self._stepped_in_pass:
            raise StepError(
                "The private loader's last batch was empty and was skipped. That a batch is empty is private, and a "
                "step of noise alone is what the accounting expects: remove the `continue`, and run the empty batch "
                "like any other (forward, backward and step work on it)."
            )
        if self._stepped_in_pass and not self._warned:
            self._warned = True
            warnings.warn(
                f"A batch of the private loader ({part.size} examples) was not followed by backward() and "
                "optimizer.step(). Whether a batch is skipped must not depend on what is in it.",
                PrivacyWarning,
                stacklevel=4,
            )
