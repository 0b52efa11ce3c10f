"""The Renyi order that proves most: a minimum over a continuous order, never at the edge of a range."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


_SMALLEST_MOMENT = 1e-4
_LARGEST_MOMENT = 1e9
_REFINEMENTS = 6  # each narrows the bracket fivefold


def best_moment(score: Callable[[Array], Array]) -> tuple[float, float]:
    """Minimise score(t) over t > 0, given that it falls and then rises (in log t): (t, score).

    A grid grows until the minimum is inside it, then closes in on it. Any t gives a valid bound, so a missed minimum
    costs tightness, never soundness.
    """
    grid = np.geomspace(_SMALLEST_MOMENT, 16.0, 32)
    values = score(grid)
    while np.argmin(values) == len(grid) - 1 and grid[-1] < _LARGEST_MOMENT:
        more = grid[-1] * np.geomspace(math.sqrt(2), 16, 8)
        grid, values = np.concatenate([grid, more]), np.concatenate([values, score(more)])
    while np.argmin(values) == 0 and grid[0] > 1e-9:
        less = grid[0] / np.geomspace(16, math.sqrt(2), 8)
        grid, values = np.concatenate([less, grid]), np.concatenate([score(less), values])
    for _ in range(_REFINEMENTS):
        at = int(np.argmin(values))
        if not math.isfinite(values[at]):
            break
        grid = np.geomspace(grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)], 11)
        values = score(grid)
    at = int(np.argmin(values))
    return float(grid[at]), float(values[at])
