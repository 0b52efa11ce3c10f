"""Per-layer clipping: a norm of its own for each parameter tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dpdl.clipping import flat_weights
from dpdl.compat.opacus.grad_sample.record import PerSampleRecord
from dpdl.compat.opacus.optimizers.optimizer import DPOptimizer
from dpdl.errors import ParameterError
from dpdl.per_sample.materialized import MaterializedGradients

__all__ = ["DPPerLayerOptimizer"]


class DPPerLayerOptimizer(DPOptimizer):
    """A private optimizer that clips each parameter's gradient to a norm of its own.

    Noise is scaled to the sensitivity of all together, the root of the sum of squares, as Opacus's is.

    Args: as in `DPOptimizer`, but `max_grad_norm` is a list, one number > 0 for each trained parameter, in order.

    Guarantee:
        One example moves the sum over all parameters by at most `sensitivity()`. Claims are `DPOptimizer`'s.

    References:
        McMahan, Ramage, Talwar, Zhang, Learning Differentially Private Recurrent Language Models, 2018.
        arXiv:1710.06963
    """

    def sensitivity(self) -> float:
        """By how much one example can move the sum, as an L2 norm.

        Raises:
            ParameterError: `max_grad_norm` has not one number for each trained parameter.
        """
        return math.hypot(*self._bounds())

    def check_max_grad_norm(self, max_grad_norm: Any) -> None:
        """Raise unless it is a list of positive numbers.

        Raises:
            ParameterError: it is not.
        """
        listed = list(max_grad_norm) if isinstance(max_grad_norm, (list, tuple)) else []
        if not listed or not all(bound > 0 for bound in listed):
            raise ParameterError(
                f'max_grad_norm must be a list of numbers > 0 for clipping="per_layer", one for each trained '
                f"parameter, got {max_grad_norm!r}. For example [1.0] * len(list(model.parameters()))."
            )

    def clip_record(self, record: PerSampleRecord, loss_scale: float) -> list[Tensor]:
        """The sum of clipped gradients of a record, parameter by parameter.

        Raises:
            ParameterError: `max_grad_norm` has not one number for each trained parameter.
        """
        return self.clip_tensors([record.of(p).float() / loss_scale for p in self.params])

    def clip_tensors(self, gradients: list[Tensor]) -> list[Tensor]:
        """The sum of clipped gradients. An example that is not finite anywhere is left out everywhere.

        Args:
            gradients: one for each trained parameter, shape [N, *shape].

        Returns:
            For each parameter a tensor of its shape.

        Raises:
            ParameterError: `max_grad_norm` has not one number for each trained parameter.
        """
        finite = torch.stack([_rows(g).isfinite().all(1).to("cpu") for g in gradients]).all(0)
        sums = []
        for gradient, bound in zip(gradients, self._bounds(), strict=True):
            rows = MaterializedGradients(tensors={"": gradient}, accumulate_dtype=torch.float32)
            weights = flat_weights(rows.norms(), max_grad_norm=bound)
            weights = torch.where(finite.to(weights.device), weights, 0.0)
            sums.append(rows.weighted_sum(weights)[""])
        return sums

    def _bounds(self) -> list[float]:
        bounds = [float(bound) for bound in self.max_grad_norm]
        if len(bounds) != len(self.params):
            raise ParameterError(
                f"max_grad_norm has {len(bounds)} numbers, but {len(self.params)} parameters are trained. Give one for "
                "each parameter that requires a gradient."
            )
        return bounds


def _rows(gradient: Tensor) -> Tensor:
    """[n, *shape] as [n, numel]; also for n = 0."""
    return gradient.reshape(len(gradient), math.prod(gradient.shape[1:]))
