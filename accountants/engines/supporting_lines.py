"""A convex trade-off curve as the upper envelope of its supporting lines.

Each proven (epsilon, delta) forbids tests below two lines [1, Proposition 2.5]:

    beta >= 1 - delta - e^eps alpha,    beta >= e^-eps (1 - delta - alpha).

A line touches the best curve that can be proved; between two neighbours the envelope lies below it by at most the
sag of delta, a convex function of e^eps, under its chord. The touching points are placed where that sag may be large.

References:
    [1] Dong, Roth, Su, Gaussian Differential Privacy, 2019. arXiv:1905.02383
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import special

from accountants.components.component import Array

LEAST_DELTA = 1e-10  # where touching ends: true positive rates below it are bounded by it
_ROUNDING = 1e-14  # of sums of numbers at most 1
_STEEPEST = 600.0  # epsilon whose e^eps still multiplies into a double
# A cell is halved while its sag may exceed either; what a smooth curve does is a quarter of what it may do.
_SAG = 2e-3  # absolute
_SAG_SHARE = 4e-2  # of the true positive rate there, while that is above
_LEAST_RATE = 1e-5
_LEAST_ALPHA = 1e-7  # lines for tests with fewer false positives are not worth a point
_FIRST_CELLS = 8
_ROUNDS = 6


def gaussian_trade_off(mu: float, alpha: Array) -> Array:
    """Phi(Phi^-1(1 - alpha) - mu), rounded down [1, Definition 2.6]; mu finite."""
    beta: Array = special.ndtr(-special.ndtri(alpha) - mu) * (1 - _ROUNDING)
    return _within(beta, alpha)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SupportingLines:
    """Points of a proven privacy curve, and the curve that their lines enclose.

    Attributes:
        epsilons: ascending from 0, shape [M].
        deltas: upper bound on delta at each, shape [M].
    """

    epsilons: Array
    deltas: Array

    @staticmethod
    def touching(delta_curve: Callable[[Array], Array], reach: float) -> SupportingLines:
        """Place the lines for a curve.

        Args:
            delta_curve: upper bounds on delta at given epsilons.
            reach: the epsilon whose delta is about LEAST_DELTA.
        """
        # Squares: delta bends most near epsilon 0, and the rest is found by halving.
        epsilons = np.unique(min(reach, _STEEPEST) * np.linspace(0, 1, _FIRST_CELLS + 1) ** 2)
        deltas = delta_curve(epsilons)
        for _ in range(_ROUNDS):
            loose = _loose_cells(epsilons, deltas)
            if not loose.any():
                break
            middles = (epsilons[:-1] + epsilons[1:])[loose] / 2
            order = np.argsort(np.concatenate([epsilons, middles]), kind="stable")
            deltas = np.concatenate([deltas, delta_curve(middles)])[order]
            epsilons = np.concatenate([epsilons, middles])[order]
        return SupportingLines(epsilons=epsilons, deltas=deltas)

    def beta(self, alpha: Array) -> Array:
        """The envelope at type I errors in [0, 1], rounded down; same shape."""
        beta = np.zeros(alpha.shape)
        for slope, delta in zip(np.exp(self.epsilons), self.deltas, strict=True):
            np.maximum(beta, 1 - delta - slope * alpha, out=beta)
            np.maximum(beta, (1 - delta - alpha) / slope, out=beta)
        return _within(beta, alpha)


def _within(beta: Array, alpha: Array) -> Array:
    return np.minimum(np.maximum(beta - _ROUNDING, 0.0), 1 - alpha)


def _loose_cells(epsilons: Array, deltas: Array) -> Array:
    """Which cells between touching points may hide too much of the curve; shape [M - 1]."""
    if len(epsilons) < 2:
        return np.zeros(len(epsilons) - 1, dtype=bool)
    slopes = np.exp(epsilons)
    # One point more at either end: the curve's reflection, delta(-eps) = 1 - e^-eps (1 - delta(eps)), and its floor.
    x = np.concatenate([[1 / slopes[1]], slopes, [2 * slopes[-1]]])
    y = np.concatenate([[1 - (1 - deltas[1]) / slopes[1]], deltas, [deltas[-1]]])
    fall = np.diff(y) / np.diff(x)
    # Convex functions lie above their neighbours' chords, prolonged: what is left is a triangle under this chord.
    left, right = np.maximum(fall[1:-1] - fall[:-2], 0), np.maximum(fall[2:] - fall[1:-1], 0)
    both = left + right
    sag = np.diff(slopes) * left * np.divide(right, both, out=np.zeros(len(both)), where=both > 0)
    corner = deltas[:-1] - slopes[:-1] * fall[1:-1]  # 1 - beta where the two lines meet
    tolerated = np.minimum(_SAG, _SAG_SHARE * np.maximum(corner, _LEAST_RATE))
    loose: Array = (sag > tolerated) & (-fall[:-2] > _LEAST_ALPHA)
    return loose
