"""Whether what enters a loss from outside is the same from batch to batch, and so cannot be computed from one.

Once a loss, or what runs beside it, has read numbers from followed tensors (numpy, tolist, item), a constant in it
may be a statistic of the batch that no trace connects to the examples. One that comes again on a batch of another
size is none; neither is a number in proportion to the batch's size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Constants"]


class Constants:
    """What one loss was computed from besides what is followed.

    Args:
        outside: numbers, tensors and operations, in order.
        size: N.
    """

    def __init__(self, outside: Iterable[Any], *, size: int) -> None:
        self.size = size
        self._entries = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in outside]

    def come_again_in(self, other: Constants) -> bool:
        """Whether those of a batch of another size are the same."""
        if self.size == other.size:
            return False  # it may be the same batch again
        pairs = zip(self._entries, other._entries, strict=False)
        return len(self._entries) == len(other._entries) and all(
            _same(one, another, self.size, other.size) for one, another in pairs
        )


def _same(one: Any, another: Any, size: int, other_size: int) -> bool:
    if isinstance(one, Tensor) or isinstance(another, Tensor):
        alike = isinstance(one, Tensor) and isinstance(another, Tensor) and one.shape == another.shape
        return alike and one.dtype == another.dtype and one.device == another.device and torch.equal(one, another)
    if type(one) is not type(another):
        return False
    if isinstance(one, np.ndarray):
        return np.array_equal(one, another)
    if isinstance(one, (int, float)) and one * other_size == another * size:
        return True
    return bool(one == another)
