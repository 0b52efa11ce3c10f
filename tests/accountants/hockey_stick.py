"""Hockey-stick divergences of explicit laws on a grid: what the accountants' bounds are held against."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from accountants.components.component import LossPair
from accountants.engines.lattice import LatticeLaw, dominated, dominating

Array = NDArray[np.float64]


def gaussian_mixture(x: Array, scale: float, centres: Iterable[tuple[float, float]]) -> Array:
    """Density at x of noise around random centres, given as (centre, probability)."""
    total = np.zeros_like(x)
    for centre, weight in centres:
        total += weight * np.exp(-((x - centre) ** 2) / (2 * scale * scale))
    return total / (scale * math.sqrt(2 * math.pi))


def laplace_mixture(x: Array, scale: float, centres: Iterable[tuple[float, float]]) -> Array:
    """The same for Laplace noise."""
    total = np.zeros_like(x)
    for centre, weight in centres:
        total += weight * np.exp(-np.abs(x - centre) / scale)
    return total / (2 * scale)


def divergence(p: Array, q: Array, epsilon: float, cell: float) -> float:
    """Integral of (p - e^eps q)+ over a grid of cells."""
    return float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum()) * cell


def delta(pair: LossPair, epsilon: float) -> float:
    """P(loss > eps) - e^eps Q(loss > eps)."""
    p, q = pair.cells(np.array([epsilon, np.inf]))
    return float(p[0] - math.exp(epsilon) * q[0])


def curve(law: LatticeLaw, epsilon: float) -> float:
    """Sum of p (1 - e^(eps - loss))+."""
    above = law.losses > epsilon
    return float(np.sum(law.mass[above] * -np.expm1(epsilon - law.losses[above]))) + law.infinite


def check_pair(pair: LossPair, *, totals: float = 1e-13) -> None:
    """Both laws have mass 1, and the lattice laws enclose the pair's curve, closely."""
    p, q = pair.cells(np.array([-np.inf, -1.0, -1e-3, 0.0, 0.02, 1.0, np.inf]))
    assert abs(p.sum() - 1) < totals
    assert abs(q.sum() - 1) < totals
    low, high = pair.tails(1e-12)
    for cells in (7, 60, 900):
        spacing = (high - low) / cells
        above = dominating(pair, spacing, (-20.0, 20.0), 1e-12)
        below = dominated(pair, spacing, (-20.0, 20.0), 1e-12)
        for epsilon in np.linspace(max(low, -3.0), min(high, 9.0), 41):
            value = delta(pair, float(epsilon))
            assert curve(below, epsilon) <= value + 1e-13
            assert curve(above, epsilon) >= value - 1e-13
    assert curve(above, 0.0) - curve(below, 0.0) <= 0.06 * delta(pair, 0.0)
