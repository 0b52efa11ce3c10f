"""Per-sample gradients held as tensors, [n, *shape] for each parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MaterializedGradients", "accumulation_dtype"]


@dataclass(frozen=True, kw_only=True)
class MaterializedGradients:
    """Gradients of n examples, one row an example.

    Attributes:
        tensors: parameter name to [n, *shape of the parameter].
        accumulate_dtype: the least precise dtype in which norms and sums are computed.
    """

    tensors: dict[str, Tensor]
    accumulate_dtype: torch.dtype

    @classmethod
    def joined(cls, parts: Sequence[Mapping[str, Tensor]], *, accumulate_dtype: torch.dtype) -> MaterializedGradients:
        """The sums of several gradients of the same n examples, in the accumulation dtype.

        Args:
            parts: each parameter name to [n, *shape of the parameter]; a name may be missing in some.
        """
        tensors: dict[str, Tensor] = {}
        for part in parts:
            for name, gradient in part.items():
                wide = gradient.to(accumulation_dtype(gradient.dtype, accumulate_dtype))
                assert name not in tensors or tensors[name].shape == wide.shape, "parts of different examples"
                tensors[name] = tensors[name] + wide if name in tensors else wide
        return cls(tensors=tensors, accumulate_dtype=accumulate_dtype)

    def norms(self) -> Tensor:
        """L2 norm over all parameters, shape [n], in the widest accumulation dtype.

        A norm that overflows although the gradient is finite is computed again in float64.
        """
        widest = self.accumulate_dtype
        for gradient in self.tensors.values():
            widest = accumulation_dtype(gradient.dtype, widest)
        norms = self._norms(self.accumulate_dtype)
        if not bool(torch.isfinite(norms).all()):
            norms = torch.where(torch.isfinite(norms), norms, self._norms(torch.float64))
        return norms.to(widest)

    def _norms(self, least: torch.dtype) -> Tensor:
        """The same in float64, from squares in `least` or wider.

        sum() adds in a tree; torch's vector_norm adds one after another, and its norm of 10^7 float32 numbers
        was seen 0.8 % too small. A norm that is too small clips too little.
        """
        squares = [
            _rows(gradient).to(accumulation_dtype(gradient.dtype, least)).square().sum(1)
            for gradient in self.tensors.values()
        ]
        device = squares[0].device
        return torch.stack([square.to(device, torch.float64) for square in squares]).sum(0).sqrt()

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


def accumulation_dtype(dtype: torch.dtype, least: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are added up: theirs, but at least `least`."""
    return torch.promote_types(dtype, least)


def _rows(gradient: Tensor) -> Tensor:
    """[n, *shape] as [n, numel]; also for scalar parameters, and n = 0."""
    return gradient.reshape(gradient.shape[0], math.prod(gradient.shape[1:]))
