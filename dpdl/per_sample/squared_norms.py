"""Squared L2 norms of rows, accurate enough to clip by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["squared_norms"]

# Numbers that a kernel may add one after another. torch's vector_norm does so over whole rows: for 10^7 float32
# numbers it was seen 0.8 % too small, and a norm that is too small clips too little.
BLOCK = 4096


def squared_norms(rows: Tensor) -> Tensor:
    """Sum of squares of each row, in the dtype of `rows`.

    Blocks of 4096 numbers are reduced by one pass of vector_norm; blocks are added in a tree. The relative error
    of a float32 sum was below 1e-6 for rows of up to 10^8 numbers.

    Args:
        rows: [n, ...], real.

    Returns:
        [n].
    """
    count, width = rows.shape[0], math.prod(rows.shape[1:])
    flat = rows if rows.ndim == 2 else rows.reshape(count, width)
    whole = width - width % BLOCK
    total: Tensor = torch.linalg.vector_norm(flat[:, whole:] if whole else flat, dim=1).square_()
    if whole:
        total += torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, BLOCK)), dim=2).square_().sum(1)
    return total
