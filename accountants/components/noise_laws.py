"""Four families of additive noise, each symmetric and log-concave: log ratios of shifted laws, and their masses.

    gaussian            N(0, 1); the unit of outcomes and shifts is its standard deviation
    laplace             density exp(-|x|) / 2; the unit is its scale
    discrete_gaussian   mass at an integer x proportional to exp(-x^2 / (2 sigma^2))                  [1]
    skellam             difference of two Poisson counts of mean v / 2: mass exp(-v) I_|x|(v) at x     [2]

The discrete two live on whole grid units, and so do their shifts.

References:
    [1] Canonne, Kamath, Steinke, The Discrete Gaussian for Differential Privacy, 2020. arXiv:2004.00010
    [2] Agarwal, Kairouz, Liu, The Skellam Mechanism for Differentially Private Federated Learning, 2021.
        arXiv:2110.04995
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
from scipy import optimize, special

from accountants.components.component import Array

Noise = Literal["gaussian", "laplace", "discrete_gaussian", "skellam"]
DISCRETE: tuple[Noise, Noise] = ("discrete_gaussian", "skellam")

GAUSSIAN_REACH = 39.0  # standard deviations: what lies beyond is below the smallest double
_LOG_REACH = 750.0  # the same for any law: -log of a mass that is 0 as a double


def gaussian_log_ratio(shift: float, x: Array) -> Array:
    """log of N(shift, 1) over N(0, 1) at x."""
    return shift * (x - shift / 2)


def gaussian_masses(edges: Array) -> Array:
    """Standard normal mass between consecutive edges, without cancellation in either tail."""
    tail = special.ndtr(-np.abs(edges))
    left, right = tail[:-1], tail[1:]
    both_sides = (edges[:-1] < 0) & (edges[1:] > 0)
    masses: Array = np.where(both_sides, 1 - left - right, np.abs(right - left))
    return masses


def laplace_log_ratio(shift: float, x: Array) -> Array:
    """log of Laplace noise centred at `shift` over that centred at 0, at x; constant outside the two centres."""
    return np.abs(x) - np.abs(x - shift)


def laplace_masses(edges: Array) -> Array:
    """Standard Laplace mass between consecutive edges, without cancellation in either tail."""
    left, right = np.minimum(edges, 0.0), np.maximum(edges, 0.0)
    below = np.exp(left[1:]) * -np.expm1(left[:-1] - left[1:])
    above = np.exp(-right[:-1]) * -np.expm1(right[:-1] - right[1:])
    masses: Array = 0.5 * (below + above)
    return masses


def discrete_gaussian_log_ratio(sigma: float, shift: float, x: Array) -> Array:
    """log of the discrete Gaussian centred at `shift` over that centred at 0."""
    return (shift / sigma) * ((x - shift / 2) / sigma)


def discrete_gaussian_log_pmf(sigma: float, x: Array) -> Array:
    """log mass at the integers x."""
    log_pmf: Array = -0.5 * (x / sigma) ** 2 - _discrete_gaussian_log_total(sigma)
    return log_pmf


def discrete_gaussian_reach(sigma: float) -> int:
    """An integer beyond which every mass is 0 as a double."""
    return math.ceil(GAUSSIAN_REACH * sigma) + 1


def skellam_log_pmf(variance: float, x: Array) -> Array:
    """log mass at the integers x."""
    order = np.abs(x).astype(np.int64)
    log_pmf, _ = _skellam(variance, _table_size(int(order.max())))
    masses: Array = log_pmf[order]
    return masses


def skellam_log_ratio(variance: float, shift: float, x: Array) -> Array:
    """log of the Skellam law centred at `shift` over that centred at 0, by its steps: no difference of large logs."""
    whole = int(shift)
    positions = x.astype(np.int64)
    _, step = _skellam(variance, _table_size(int(np.abs(positions).max()) + abs(whole)))
    total = np.zeros(len(x))
    for moved in range(abs(whole)):
        # From centre m to m + 1 at x is from centre 0 to 1 at x - m; downwards by symmetry.
        here = positions - moved if whole > 0 else -positions - moved
        total += np.where(here > 0, step[np.maximum(here - 1, 0)], -step[np.maximum(-here, 0)])
    return total


@functools.lru_cache(maxsize=64)
def skellam_reach(variance: float) -> int:
    """An integer beyond which every mass is 0 as a double, by Chernoff's bound."""

    def exponent(k: float) -> float:
        # k asinh(k / v) - (sqrt(k^2 + v^2) - v), the second without cancellation.
        return k * math.asinh(k / variance) - k * (k / (math.hypot(k, variance) + variance)) - _LOG_REACH

    high = 1.0
    while exponent(high) < 0:
        high *= 2
    return math.ceil(float(optimize.brentq(exponent, high / 2 if high > 1 else 0.0, high))) + 1


@functools.lru_cache(maxsize=64)
def _discrete_gaussian_log_total(sigma: float) -> float:
    """log of the sum over all integers of exp(-x^2 / (2 sigma^2))."""
    if sigma > 6:
        # Poisson summation: the relative error is 2 exp(-2 pi^2 sigma^2).
        return math.log(sigma) + 0.5 * math.log(2 * math.pi)
    x = np.arange(1.0, discrete_gaussian_reach(sigma) + 1)
    return math.log1p(2 * float(np.sum(np.exp(-0.5 * (x / sigma) ** 2))))


def _table_size(order: int) -> int:
    """`order` rounded up to a power of two, so that nearby questions share their tables."""
    return 1 << max(order, 16).bit_length()


@functools.lru_cache(maxsize=8)
def _skellam(variance: float, size: int) -> tuple[Array, Array]:
    """log mass at 0 .. size, and log I_k - log I_(k+1) at k = 0 .. size, of Bessel functions at `variance`.

    The ratio r_k = I_(k+1) / I_k obeys r_(k-1) = 1 / (2 k / v + r_k); downwards, errors shrink and change sign. It
    starts from the asymptotic ratio v / (k + 1 + sqrt((k + 1)^2 + v^2)).
    """
    start = size + 32
    ratio = variance / (start + 1 + math.hypot(start + 1, variance))
    ratios = np.empty(start)
    for k in range(start, 0, -1):
        ratio = 1 / (2 * k / variance + ratio)
        ratios[k - 1] = ratio
    steps = -np.log(ratios[: size + 1])
    # Extended precision where there is one: the sum runs over many steps.
    log_masses = np.concatenate([[0.0], -np.cumsum(steps[:-1].astype(np.longdouble))]).astype(np.float64)
    log_masses -= math.log1p(2 * float(np.sum(np.exp(log_masses[1:]))))
    return log_masses, steps
