"""The loss of ghost mode: an object whose `backward()` is what a plain loss's is.

Opacus goes backward twice here. The engines of this library need one backward, so a plain `criterion(...)` and its
`backward()` do as well; these names are for scripts that use what ghost mode returns.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from dpdl.errors import ParameterError

__all__ = ["DPLossFastGradientClipping", "DPTensorFastGradientClipping"]


class DPTensorFastGradientClipping:
    """Each example's loss, and arithmetic on it.

    Args:
        module, optimizer: taken for compatibility.
        loss_per_sample: [N].
        loss_reduction: "mean" or "sum", how `backward()` combines it.
    """

    def __init__(self, module: Any, optimizer: Any, loss_per_sample: Tensor, loss_reduction: str = "mean") -> None:
        self.module = module
        self.optimizer = optimizer
        self.loss_per_sample = loss_per_sample
        self.loss_reduction = loss_reduction

    def _reduced(self) -> Tensor:
        return self.loss_per_sample.mean() if self.loss_reduction == "mean" else self.loss_per_sample.sum()

    def item(self) -> float:
        """The loss of the batch. Private: without noise."""
        return float(self._reduced().detach())

    def detach(self) -> Tensor:
        """The loss of the batch, a scalar, without its graph."""
        return self._reduced().detach()

    def backward(self) -> None:
        """Go backward once through the loss of the batch."""
        self._reduced().backward()

    def _with(self, loss_per_sample: Tensor) -> DPTensorFastGradientClipping:
        return DPTensorFastGradientClipping(self.module, self.optimizer, loss_per_sample, self.loss_reduction)

    def __add__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._with(self.loss_per_sample + _values(other))

    def __radd__(self, other: Any) -> DPTensorFastGradientClipping:
        return self.__add__(other)

    def __sub__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._with(self.loss_per_sample - _values(other))

    def __rsub__(self, other: Any) -> DPTensorFastGradientClipping:
        return self.__neg__().__add__(other)

    def __mul__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._with(self.loss_per_sample * _values(other))

    def __rmul__(self, other: Any) -> DPTensorFastGradientClipping:
        return self.__mul__(other)

    def __truediv__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._with(self.loss_per_sample / _values(other))

    def __neg__(self) -> DPTensorFastGradientClipping:
        return self._with(-self.loss_per_sample)

    def __repr__(self) -> str:
        return f"DPTensorFastGradientClipping({self.loss_per_sample!r}, loss_reduction={self.loss_reduction!r})"


def _values(other: Any) -> Any:
    return other.loss_per_sample if isinstance(other, DPTensorFastGradientClipping) else other


class DPLossFastGradientClipping:
    """A criterion that returns each example's loss as a `DPTensorFastGradientClipping`.

    Args:
        module, optimizer: of the run.
        criterion: a loss module with a `reduction`.
        loss_reduction: "mean" or "sum"; the criterion's and the run's.

    Raises:
        ParameterError: the criterion has another reduction, or none.
    """

    def __init__(self, module: Any, optimizer: Any, criterion: Any, loss_reduction: str = "mean") -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ParameterError(f'loss_reduction must be "mean" or "sum", got {loss_reduction!r}.')
        if getattr(criterion, "reduction", None) != loss_reduction:
            raise ParameterError(
                f"The criterion {criterion!r} has reduction {getattr(criterion, 'reduction', None)!r}, but the run has "
                f'loss_reduction={loss_reduction!r}. Give a loss module such as CrossEntropyLoss(reduction="mean").'
            )
        self.module = module
        self.optimizer = optimizer
        self.criterion = criterion
        self.loss_reduction = loss_reduction
        self._unreduced = copy.copy(criterion)
        self._unreduced.reduction = "none"

    def __call__(self, *args: Any, shape: tuple[int, ...] | None = None, **kwargs: Any) -> DPTensorFastGradientClipping:
        """The loss.

        Args:
            args, kwargs: as the criterion takes them.
            shape: of logits before they were flattened, [N, T, ...]: the loss of T positions is combined for each
                of N examples, leaving out those that the criterion ignores.
        """
        loss = self._unreduced(*args, **kwargs)
        if shape is not None and loss.shape[0] == shape[0] * shape[1]:
            loss = loss.reshape(shape[0], shape[1])
            targets = kwargs.get("target", args[1] if len(args) > 1 else None)
            loss = self._over_positions(loss, targets)
        return DPTensorFastGradientClipping(self.module, self.optimizer, loss, self.loss_reduction)

    def _over_positions(self, loss: Tensor, targets: Tensor | None) -> Tensor:
        if self.loss_reduction == "sum":
            return loss.sum(1)
        ignored = getattr(self.criterion, "ignore_index", None)
        if ignored is None or targets is None:
            return loss.mean(1)
        counted = (targets.reshape(loss.shape) != ignored).sum(1).clamp(min=1)
        combined: Tensor = loss.sum(1) / counted.to(torch.float32)
        return combined
