"""exp and log less their first orders, without cancellation near 0."""

from __future__ import annotations

import numpy as np

from accountants.components.component import Array

_SMALL = 0.03  # below it, series replace differences: both err by about 1e-14


def exp_remainder(x: Array) -> Array:
    """e^x - 1 - x, any shape; x at most 709."""
    near = np.abs(x) < _SMALL
    small = np.where(near, x, 0.0)
    series = np.ones_like(small)
    for n in range(9, 2, -1):
        series = 1 + small / n * series
    remainder: Array = np.where(near, small * small / 2 * series, np.expm1(x) - x)
    return remainder


def log_remainder(x: Array) -> Array:
    """log(1 + x) - x, any shape; x > -1 and finite."""
    near = np.abs(x) < _SMALL
    small = np.where(near, x, 0.0)
    series = np.zeros_like(small)
    for n in range(12, 1, -1):
        series = small * series + (-1) ** (n + 1) / n
    remainder: Array = np.where(near, small * small * series, np.log1p(x) - x)
    return remainder
