"""The loss of a head, one row at a time: no row's loss can depend on another row.

A loss function is written for a batch, and could average over it, normalise by it, or compare its rows. Here it is
given each row as a batch of one, in one vectorised call where `torch.func.vmap` can run it, so that the gradient of a
row is its own whatever the function does. What it says of a whole batch is compared with that: a mean is refused,
since the training that its author has in mind is another one, and so is a loss that compares rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from dpdl.errors import DataError, LossError
from dpdl.per_sample.self_check import tolerance_of
from dpdl.split.graph import Head, LossFunction

__all__ = ["RowLoss"]

# Batches of two rows and more on which the reduction is looked at, made-up ones not among them.
CHECKS = 2


class RowLoss:
    """One head's loss.

    Args:
        head: with its loss function.
    """

    def __init__(self, head: Head) -> None:
        assert head.loss_fn is not None
        self._head, self._loss_fn = head, head.loss_fn
        self._vectorised: bool | None = None  # not tried yet
        self._checks_left = CHECKS
        self._judged: Tensor | None = None  # no rows, like the outputs that it was given

    def refuse_labels(self, labels: Tensor) -> None:
        """Raise if the loss cannot be computed from these labels; nothing is known before the first call.

        Raises:
            DataError: it cannot: a class out of range, or another shape or dtype than it takes.
        """
        if self._judged is None or not len(labels):
            return
        outputs = self._judged.new_zeros((len(labels), *self._judged.shape[1:]))
        try:
            with torch.no_grad():
                _total(self._loss_fn, outputs, labels.to(outputs.device), self._head.name)
        except (RuntimeError, ValueError, IndexError, TypeError, LossError) as error:
            raise DataError(
                f"The loss of head '{self._head.name}' cannot be computed from labels of shape {tuple(labels.shape)} "
                f"and {labels.dtype} ({type(error).__name__}). Number classes from 0, as many as there are outputs."
            ) from error

    def gradients(self, outputs: Tensor, labels: Tensor, *, made_up: bool = False) -> Tensor:
        """The gradient of each row's own loss, shaped as outputs.

        Raises:
            LossError: the loss averages over rows, lets them meet, or does not give one number a row.
        """
        if not len(outputs):
            return torch.zeros_like(outputs)
        self._judged = outputs.detach()[:0]
        labels = labels.to(outputs.device)
        rows = self._of_each(outputs.detach(), labels)
        if len(outputs) > 1 and (made_up or self._checks_left):
            self._refuse_other_reductions(outputs, labels, rows)
            self._checks_left -= not made_up
        return rows

    def _of_each(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self._vectorised is not False:
            try:
                rows = self._vmapped(outputs, labels)
            except (RuntimeError, ValueError, IndexError, TypeError):  # whatever vmap meets in user code
                if self._vectorised:
                    raise
            else:
                self._vectorised = True
                return rows
        rows = torch.cat([self._together(outputs[n : n + 1], labels[n : n + 1]) for n in range(len(outputs))])
        self._vectorised = False  # after it was computed: rows that cannot be are no reason to go slowly ever after
        return rows

    def _vmapped(self, outputs: Tensor, labels: Tensor) -> Tensor:
        def own(output: Tensor, label: Tensor) -> Tensor:
            return _total(self._loss_fn, output.unsqueeze(0), label.unsqueeze(0), self._head.name)

        rows: Tensor = vmap(grad_and_value(own))(outputs, labels)[0]
        return rows

    def _together(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The gradient of what the function says of these rows."""
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            total = _total(self._loss_fn, leaf, labels, self._head.name)
        if not total.requires_grad:
            return torch.zeros_like(outputs)
        found: Tensor = torch.autograd.grad(total, leaf)[0]
        return found

    def _refuse_other_reductions(self, outputs: Tensor, labels: Tensor, rows: Tensor) -> None:
        together = self._together(outputs, labels)
        finite = torch.isfinite(rows).flatten(1).all(1)
        rows, together = rows[finite].double(), together[finite].double()
        tolerance = tolerance_of(outputs.dtype) * float(rows.norm())
        if float((together - rows).norm()) <= tolerance:
            return
        if float((together * len(outputs) - rows).norm()) <= tolerance * len(outputs):
            raise LossError(
                f"The loss of head '{self._head.name}' is a mean over rows. The gradient at a cut is that of each "
                "row's own loss, and the step divides by the plan's expected batch size: use reduction='sum'."
            )
        raise LossError(
            f"The loss of head '{self._head.name}' of several rows is not the sum of the rows' own losses: it compares "
            "rows, or weighs them by each other, and one row would move the others' gradients. Write it so that each "
            "row enters alone (no contrastive loss, no normalisation over the batch)."
        )


def _total(loss_fn: LossFunction, outputs: Tensor, labels: Tensor, name: str) -> Tensor:
    """The sum over rows of what a loss function returns: one number, or one a row."""
    loss = loss_fn(outputs, labels)
    if not isinstance(loss, Tensor) or loss.shape not in (torch.Size(()), outputs.shape[:1]):
        raise LossError(
            f"The loss of head '{name}' returned {getattr(loss, 'shape', type(loss).__name__)} for {len(outputs)} "
            "rows. Return their sum, one number, or one number a row."
        )
    return loss.sum()
