"""What one use of one tensor adds to the per-sample gradients of that tensor.

An operation that ran with a tensor (a weight, say) leaves a contribution when the gradient of its output is
known. Contributions answer in the order in which clipping asks: norms first, then, with the weights known, one
weighted sum. A contribution is free to never form the gradients that it stands for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dpdl.per_sample.squared_norms import squared_norms

__all__ = ["Contribution", "Materialized"]


class Contribution(ABC):
    """Per-sample gradients of one tensor from one use, in whatever form is cheapest.

    Operands are in the dtype in which sums are to be taken, float32 or wider: the tape sees to that.
    An example's answers depend on that example's operands only, also if others are not finite.
    """

    _squares: Tensor | None = None

    def norms_squared(self) -> Tensor:
        """Squared L2 norm of each example's gradient, shape [N]; not below the truth but for rounding.

        Computed once.
        """
        if self._squares is None:
            self._squares = self._norms_squared()
        return self._squares

    @abstractmethod
    def _norms_squared(self) -> Tensor:
        """The same."""

    @abstractmethod
    def weighted_sum(self, weights: Tensor) -> Tensor:
        """sum_n weights[n] * gradient_n, shaped as the tensor. All operands are finite where weights are not 0."""

    @abstractmethod
    def materialize(self) -> Tensor:
        """The gradients themselves, [N, *shape of the tensor]."""

    @abstractmethod
    def rows(self, index: Tensor) -> Contribution:
        """The same for the examples at `index` only."""

    @abstractmethod
    def double(self) -> Contribution:
        """The same with operands in float64."""

    def joined(self, others: Sequence[Contribution]) -> Contribution | None:
        """One contribution equal to the sum of this and others to the same tensor; None if that needs materialising."""
        return None


class Materialized(Contribution):
    """Gradients held as they are.

    Args:
        gradients: [N, *shape of the tensor].
    """

    def __init__(self, gradients: Tensor) -> None:
        self._gradients = gradients

    def _norms_squared(self) -> Tensor:
        return squared_norms(self._gradients)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See `Contribution`."""
        rows = self._gradients.reshape(self._gradients.shape[0], -1)
        return torch.mv(rows.t(), weights.to(rows.dtype)).view(self._gradients.shape[1:])

    def materialize(self) -> Tensor:
        """See `Contribution`."""
        return self._gradients

    def rows(self, index: Tensor) -> Materialized:
        """See `Contribution`."""
        return Materialized(self._gradients[index])

    def double(self) -> Materialized:
        """See `Contribution`."""
        return Materialized(self._gradients.double())

    def joined(self, others: Sequence[Contribution]) -> Contribution | None:
        """See `Contribution`."""
        total = self._gradients
        for other in others:
            total = total + other.materialize()
        return Materialized(total)
