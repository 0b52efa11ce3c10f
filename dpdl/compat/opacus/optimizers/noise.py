"""Noise of one tensor, for optimizers of one's own."""

from __future__ import annotations

import torch
from torch import Tensor

from dpdl.compat.opacus.randomness import Randomness
from dpdl.noise.gaussian import gaussian_mechanism
from dpdl.per_sample.engine import accumulation_dtype
from dpdl.types import ClippedSum

__all__ = ["_generate_noise"]


def _generate_noise(
    std: float, reference: Tensor, generator: torch.Generator | None = None, secure_mode: bool = False
) -> Tensor:
    """Gaussian noise shaped as `reference`, for optimizers of one's own that override `add_noise`."""
    zeros = torch.zeros_like(reference, dtype=accumulation_dtype(reference.dtype, torch.float32))
    if std == 0:
        return zeros.to(reference.dtype)
    clipped = ClippedSum(tensors={"": zeros}, sensitivity=std, examples=0, clipped=0, non_finite=0)
    stream = Randomness(generator, secure=secure_mode).next_stream("noise")
    return gaussian_mechanism(clipped, noise_multiplier=1.0, stream=stream, step=0).tensors[""].to(reference.dtype)
