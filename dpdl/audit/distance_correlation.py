"""Distance correlation of inputs and activations: how much the distances of one tell about those of the other.

    distance_correlation(x, z)            # about 0 if independent; differentiable
    biased_distance_correlation(x, z)     # the usual one, which is near 1 for small batches of independent data

The V-statistic that is mostly used has a bias that grows with the dimension and falls slowly with the batch: for
independent normal data of 784 and 128 dimensions it is 0.965 at 64 rows and 0.886 at 256. What goes down when it is
minimised is then hardly dependence. The U-statistic [2] has no such bias, and so can be below zero.

Axes: i, j row. Public or private is what x and z are: the figure is an un-noised function of all of them.

References:
    [1] Székely, Rizzo, Bakirov, Measuring and testing dependence by correlation of distances, Annals of Statistics
        35(6), 2007, section 2.3 (the V-statistic).
    [2] Székely, Rizzo, Partial distance correlation with methods for dissimilarities, Annals of Statistics 42(6),
        2014. arXiv:1310.2926, definition 2 and equation 3.3 (U-centring, the unbiased estimate), 3.5 (correlation).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpdl.errors import ParameterError

__all__ = ["FEWEST_ROWS", "biased_distance_correlation", "distance_correlation"]

FEWEST_ROWS = 4  # the U-statistic divides by n (n - 3)
# Centred distances of less than this many units in the last place of the mean distance are rounding, not spread.
_ROUNDING_UNITS = 64


def distance_correlation(x: Tensor, z: Tensor) -> Tensor:
    """The squared distance correlation, bias-corrected (U-statistic), of rows of x and z.

    R = <A, B> / sqrt(<A, A> <B, B>) of the U-centred matrices of Euclidean distances              [2, 3.5]

    Args:
        x: shape [n, ...], floating point, n >= 4; each row is taken as one vector.
        z: shape [n, ...], on the device of x.

    Returns:
        A scalar, in the wider of the two dtypes and at least float32. At most 1; about 0 if x and z are independent,
        and as often below 0 as above. 0 if the rows of x, or of z, have equal distances from each other: such rows
        tell nothing. Differentiable by both; where two rows coincide their distance counts as constant. Memory: a few
        matrices [n, n], never [n, n, d].

    Guarantee:
        None. It measures, on this batch, one kind of dependence. Data with a distance correlation of 0 in a sample can
        be recovered by someone who decodes them, and no bound on what leaks follows from any value.

    Raises:
        ParameterError: fewer than 4 rows, different numbers of rows, or not floating point.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
        >>> round(distance_correlation(x, 3 * x - 1).item(), 6)
        1.0

    References:
        As [2] above.
    """
    x, z = _rows("x", x), _rows("z", z)
    _refuse_other_counts(x, z, fewest=FEWEST_ROWS)
    dtype = torch.promote_types(x.dtype, z.dtype)
    return _correlation(_centred(x.to(dtype), bias="U"), _centred(z.to(dtype), bias="U"))


def biased_distance_correlation(x: Tensor, z: Tensor) -> Tensor:
    """The distance correlation with its bias (V-statistic, not squared): for comparison with published figures only.

    Args:
        x, z: shape [n, ...], as in `distance_correlation`, but from 2 rows on.

    Returns:
        A scalar in [0, 1]. **Near 1 for independent data**, if there are few rows of many dimensions.

    Guarantee:
        None, as of `distance_correlation`.

    Raises:
        ParameterError: fewer than 2 rows, different numbers of rows, or not floating point.

    References:
        As [1] above.
    """
    x, z = _rows("x", x), _rows("z", z)
    _refuse_other_counts(x, z, fewest=2)
    dtype = torch.promote_types(x.dtype, z.dtype)
    squared = _correlation(_centred(x.to(dtype), bias="V"), _centred(z.to(dtype), bias="V"))
    return _root(squared)


def _rows(name: str, rows: Tensor) -> Tensor:
    """As a matrix, in float32 or wider: differences of centred distances are lost in halves."""
    if not isinstance(rows, Tensor) or rows.ndim == 0 or not rows.is_floating_point():
        got = f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ParameterError(f"{name} must be a floating point tensor with the rows first, got {got}.")
    return rows.reshape(len(rows), -1).to(torch.promote_types(rows.dtype, torch.float32))


def _refuse_other_counts(x: Tensor, z: Tensor, *, fewest: int) -> None:
    if len(x) != len(z):
        raise ParameterError(f"x has {len(x)} rows and z has {len(z)}. Give the same records, in the same order.")
    if len(x) < fewest:
        raise ParameterError(f"A distance correlation needs at least {fewest} rows, got {len(x)}. Give a larger batch.")


def _centred(rows: Tensor, *, bias: Literal["U", "V"]) -> Tensor:
    """The matrix of distances, centred; exactly zero if what is left of it is rounding."""
    n = len(rows)
    # By matrix products distances would be faster, and wrong for rows that nearly coincide. The gradient of a distance
    # of zero is taken as zero, not 0/0.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    row_sums = distances.sum(dim=1)
    total = row_sums.sum()
    if bias == "U":
        row_sums = row_sums / (n - 2)
        centred = distances - row_sums[:, None] - row_sums[None, :] + total / ((n - 1) * (n - 2))
        centred = centred - torch.diag(torch.diagonal(centred))
    else:
        row_sums = row_sums / n
        centred = distances - row_sums[:, None] - row_sums[None, :] + total / n**2
    with torch.no_grad():
        rounding = _ROUNDING_UNITS * torch.finfo(rows.dtype).eps * total / n**2
        constant = centred.abs().amax() <= rounding
    return torch.where(constant, torch.zeros_like(centred), centred)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> / (|a| |b|); 0 if one of them is zero. What divides the sums of either statistic falls out."""
    sizes = _root((a * a).sum()) * _root((b * b).sum())
    there = sizes > 0
    return torch.where(there, (a * b).sum() / torch.where(there, sizes, torch.ones_like(sizes)), sizes)


def _root(squared: Tensor) -> Tensor:
    """The square root, with a gradient of zero at zero."""
    there = squared > 0
    return torch.where(there, torch.where(there, squared, torch.ones_like(squared)).sqrt(), torch.zeros_like(squared))
