"""Per-sample gradients held as tensors, [n, *shape] for each parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpdl.per_sample.engine import accumulation_dtype

__all__ = ["MaterializedGradients"]


@dataclass(frozen=True, kw_only=True)
class MaterializedGradients:
    """Gradients of n examples, one row an example.

    Attributes:
        tensors: parameter name to [n, *shape of the parameter].
        accumulate_dtype: the least precise dtype in which norms and sums are computed.
    """

    tensors: dict[str, Tensor]
    accumulate_dtype: torch.dtype

    def norms(self) -> Tensor:
        """L2 norm over all parameters, shape [n].

        A norm that overflows its dtype although the gradient is finite is computed again in float64.
        """
        norms = self._norms(self.accumulate_dtype)
        if not bool(torch.isfinite(norms).all()):
            norms = torch.where(torch.isfinite(norms), norms, self._norms(torch.float64).to(norms.dtype))
        return norms

    def _norms(self, least: torch.dtype) -> Tensor:
        per_parameter = [
            torch.linalg.vector_norm(_rows(g), dim=1, dtype=accumulation_dtype(g.dtype, least))
            for g in self.tensors.values()
        ]
        widest = per_parameter[0].dtype
        for norm in per_parameter:
            widest = torch.promote_types(widest, norm.dtype)
        device = per_parameter[0].device
        norms: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device, widest) for n in per_parameter]), dim=0)
        return norms

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """sum_n weights[n] * gradient_n, each shaped as its parameter.

        Rows of weight 0 are left out rather than multiplied: 0 * NaN is NaN.
        """
        kept = weights != 0
        all_kept = bool(kept.all())
        sums = {}
        for name, gradient in self.tensors.items():
            dtype = accumulation_dtype(gradient.dtype, self.accumulate_dtype)
            rows, factors = _rows(gradient), weights.to(gradient.device, dtype)
            if not all_kept:
                mask = kept.to(gradient.device)
                rows, factors = rows[mask], factors[mask]
            sums[name] = (factors @ rows.to(dtype)).view(gradient.shape[1:])
        return sums

    def materialize(self) -> dict[str, Tensor]:
        """The gradients themselves."""
        return self.tensors


def _rows(gradient: Tensor) -> Tensor:
    """[n, *shape] as [n, numel]; also for scalar parameters, and n = 0."""
    return gradient.reshape(gradient.shape[0], math.prod(gradient.shape[1:]))
