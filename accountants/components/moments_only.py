"""Mechanisms known by their Renyi curve only: no pair of laws, so every accountant falls back to Renyi's bound.

Their curves hold for either direction.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from accountants.components.component import Array, Component, Direction

_ROUNDING = 1e-14  # relative
_LARGEST = 1e300  # a divergence that stands for any larger one: none is proved by it


@dataclasses.dataclass(frozen=True)
class Concentrated(Component):
    """(xi, rho)-zero-concentrated differential privacy: divergence at most xi + rho * order.

    Attributes:
        rho: >= 0.
        xi: >= 0.
    """

    rho: float
    xi: float

    def pair(self, direction: Direction) -> None:
        """None."""
        return None

    def log_moments(self, direction: Direction, t: Array) -> Array:
        """t (xi + rho (1 + t))."""
        with np.errstate(over="ignore"):
            moments: Array = t * (self.xi + self.rho * (1 + t)) * (1 + _ROUNDING)
        return moments


@dataclasses.dataclass(frozen=True)
class SkellamVectorNoise(Component):
    """Skellam noise on integer vectors: at whole orders a > 1 the divergence is at most               [1, Section 3]

        a l2^2 / (2 v) + min(((2 a - 1) l2^2 + 6 l1) / (4 v^2), 3 l1 / (2 v))

    Between whole orders, log moments are bounded by their chord: they are convex, and 0 at order 1.

    Attributes:
        variance: v > 0, of each coordinate's noise.
        l1: how far neighbours' vectors are apart at most, in L1.
        l2: the same in L2.

    References:
        [1] Agarwal, Kairouz, Liu, The Skellam Mechanism for Differentially Private Federated Learning, 2021.
            arXiv:2110.04995
    """

    variance: float
    l1: float
    l2: float

    def pair(self, direction: Direction) -> None:
        """None."""
        return None

    def log_moments(self, direction: Direction, t: Array) -> Array:
        """The chord between the whole orders around 1 + t."""
        t = np.asarray(t, dtype=np.float64)
        below = np.floor(t)
        part = t - below
        with np.errstate(over="ignore"):
            chord = (1 - part) * self._at_whole(below) + part * self._at_whole(below + 1)
        moments: Array = np.where(np.isfinite(chord), chord * (1 + _ROUNDING), np.inf)
        return moments

    def _at_whole(self, t: Array) -> Array:
        # Ratios first: squares of lengths may leave the range of a double.
        square = (self.l2 / math.sqrt(self.variance)) ** 2
        linear = self.l1 / self.variance
        with np.errstate(over="ignore"):
            extra = np.minimum(((2 * t + 1) * square + 6 * linear) / (4 * self.variance), 1.5 * linear)
            moments: Array = t * ((1 + t) * square / 2 + np.minimum(extra, _LARGEST))
        return moments
