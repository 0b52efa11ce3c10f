"""Rows clipped and noised: the one mechanism of everything that crosses a cut row by row.

    clipped = clip_rows(rows, max_norm=1.0)                       # differentiable: the client's part ends with it
    sent = noised_rows(clipped, max_norm=1.0, noise_multiplier=2.0, stream=stream, number=step)

A row is a function of one example alone, given the weights. Whoever knows that the example is there and asks what it is
compares two rows of norm at most C: they lie up to 2 C apart, not C. That factor of two is the accountant's, who has it
from the relation: `Gaussian(s)` under REPLACE_ONE, s = noise std / C, is N(0, s^2) against N(2, s^2), mu = 2 / s in
Gaussian differential privacy [1]. (The same numbers under ADD_OR_REMOVE would be written Gaussian(s / 2).)

Private: rows, clipped or not. Public: what `noised_rows` returns, norms and multipliers.

References:
    [1] Dong, Roth, Su, Gaussian Differential Privacy, 2019. arXiv:1905.02383
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from accountants import arguments
from dpdl.errors import ModelError, ParameterError
from dpdl.noise import gaussian_mechanism
from dpdl.secure_random import RandomStream
from dpdl.types import ClippedSum

__all__ = ["clip_rows", "clipping_norm", "noise_of_rows", "noised_rows", "refuse_other_than_rows"]

# Clipping in float64 leaves norms within a few units in the last place of the bound, for up to 2^20 numbers a row less
# than this part of it: aimed that much lower, they are below it in exact arithmetic.
_MARGIN = 2.0**-40


def clipping_norm(owner: str, max_norm: object) -> float:
    """A row's largest L2 norm, as given to `owner`.

    Raises:
        ParameterError: there is no clipping, and so no amount of noise that would protect anything.
    """
    remedy = f"Noise on rows that are not clipped protects nothing: give {owner} a max_norm such as 1.0."
    if isinstance(max_norm, bool) or not isinstance(max_norm, int | float) or not 0 < max_norm < math.inf:
        raise ParameterError(f"max_norm of {owner} must be finite and > 0, got {max_norm!r}. {remedy}")
    return float(max_norm)


def noise_of_rows(owner: str, noise_multiplier: object) -> float:
    """Noise std over clipping norm, as given to `owner`.

    Raises:
        ParameterError: it is not positive: rows would leave as they are.
    """
    value = arguments.noise_scale("noise_multiplier", noise_multiplier)
    if value == 0:
        raise ParameterError(
            f"noise_multiplier of {owner} must be > 0, got {noise_multiplier!r}: rows would be released as they are. "
            "To send them without protection, leave the release out; the report then says so."
        )
    return value


def clip_rows(rows: Tensor, *, max_norm: float) -> Tensor:
    """Each row scaled down to L2 norm at most max_norm, over all of its axes.

    Args:
        rows: shape [n, ...], floating point.
        max_norm: C > 0.

    Returns:
        Rows of the same shape and dtype; one that is not finite becomes zero. Gradients go through the scaling, and are
        zero for such a row.

    Example:
        >>> clip_rows(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), max_norm=1.0)
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    if rows.numel() == 0:
        return rows
    flat = rows.reshape(len(rows), -1)
    with torch.no_grad():
        usable = torch.isfinite(torch.linalg.vector_norm(flat, dim=1, keepdim=True))
    flat = torch.where(usable, flat, torch.zeros((), dtype=flat.dtype, device=flat.device))
    norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    clipped: Tensor = flat * (max_norm / norms.clamp_min(max_norm))
    return clipped.reshape(rows.shape)


def refuse_other_than_rows(rows: Tensor) -> None:
    """Raise if this has no rows to be noised.

    Raises:
        ModelError: it is not floating point, or has no axis of rows.
    """
    if rows.ndim == 0 or not rows.dtype.is_floating_point:
        raise ModelError(
            f"What crosses the cut must be floating point with the examples on axis 0, got {rows.dtype} of shape "
            f"{tuple(rows.shape)}. Noise on whole numbers, or on something not made of rows, has no sensitivity."
        )


def noised_rows(rows: Tensor, *, max_norm: float, noise_multiplier: float, stream: RandomStream, number: int) -> Tensor:
    """Rows, clipped here whether or not they come clipped, plus N(0, (noise_multiplier * max_norm)^2) each coordinate.

    Args:
        rows: shape [n, ...], float16, bfloat16, float32 or float64, on any device.
        max_norm: C.
        noise_multiplier: s.
        stream: of this release alone.
        number: of the release in the stream. **The same number adds the same noise again.**

    Returns:
        Noised rows, detached, in the shape, dtype and device of `rows`. The sum is taken in float64, on a grid that
        does not depend on the rows (`dpdl.noise.gaussian`).

    Guarantee:
        Replacing one example, the others' rows and the weights being equal: Gaussian(s) under REPLACE_ONE.

    Raises:
        ModelError: rows are not floating point, or have no axis of rows.
    """
    refuse_other_than_rows(rows)
    if rows.numel() == 0:
        return rows.detach().clone()
    exact = clip_rows(rows.detach().to("cpu", torch.float64), max_norm=max_norm * (1 - _MARGIN))
    # To the mechanism this is one sum, which a row added to it moves by at most C.
    clipped = ClippedSum(tensors={"rows": exact}, sensitivity=max_norm, examples=len(rows), clipped=0, non_finite=0)
    noisy = gaussian_mechanism(clipped, noise_multiplier=noise_multiplier, stream=stream, step=number)
    return noisy.tensors["rows"].to(device=rows.device, dtype=rows.dtype)
