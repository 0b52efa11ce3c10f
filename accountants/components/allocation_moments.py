"""Moments of the likelihood ratio R of random allocation (`allocation_law`), without discretising it.

remove: E_P e^(tL) = E_Q R^(1 + t). At integer orders a = 1 + t, R^a expands into independent coordinates, each with
E l^k = exp(k (k - 1) / (2 s^2)), so that [1]

    E_Q R^a = a! T^-a [z^a] ( sum_k z^k / k! exp(k (k - 1) / (2 s^2)) )^T.

log E_P e^(tL) is convex in t and 0 at t = 0: the chord between integers is an upper bound.

add: E_Q R^-t = 1 / Gamma(t) integral over u > 0 of u^(t - 1) phi(u / T)^T, with phi(w) = E e^(-w l), since
E e^(-u R) = phi(u / T)^T; both integrals are analytic and decay fast, which suits the trapezoid rule.

Two bounds hold besides. Allocation hidden from nobody is one Gaussian step: t (t + 1) / (2 s^2) either way. And
log R >= the mean of log l_i (Jensen), normal with mean -1 / (2 s^2) and variance 1 / (T s^2): t / (2 s^2) +
t^2 / (2 T s^2) for "add".

References:
    [1] Feldman, Shenfeld, Privacy Amplification by Random Allocation, 2025. arXiv:2502.08202
"""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy import special

from accountants.components.component import Array, Direction

SLACK = 1e-10  # relative, and
_ABSOLUTE_SLACK = 1e-11  # absolute: above rounding in sums of logarithms and above the quadratures' errors
_LEAST_SCALE = 0.05  # below, and
_MOST_ORDERS = 1024  # beyond, the bounds of one Gaussian step and of Jensen stand alone
_CELLS = 2**23  # the most nodes of a double quadrature
_TAIL = 12.0  # standard deviations beyond what the tilt moves


def log_moments(scale: float, bins: int, direction: Direction, t: Array) -> Array:
    """log E_P exp(t * privacy loss), from above.

    Args:
        scale: s, the noise's standard deviation over the sensitivity, > 0.
        bins: T >= 1.
        direction: "remove" or "add".
        t: moments, shape [M], > 0.

    Returns:
        Upper bounds, shape [M], >= 0.
    """
    t = np.asarray(t, dtype=np.float64)
    precision = 1 / scale / scale
    bound = t * (t + 1) / 2 * precision
    if direction == "add":
        bound = np.minimum(bound, t / 2 * precision + t * t / (2 * bins) * precision)
    if scale >= _LEAST_SCALE:
        known = _known(scale, bins, direction, float(t.max()))
        reached = t <= len(known) - 1
        moments = np.interp(t[reached], np.arange(len(known)), known)
        # The chord from 0 carries the slack of t = 1 down in proportion.
        slack = _ABSOLUTE_SLACK * np.minimum(t[reached], 1.0)
        bound[reached] = np.minimum(bound[reached], np.maximum(moments, 0.0) + slack)
    return bound * (1 + SLACK)


def _known(scale: float, bins: int, direction: Direction, largest: float) -> Array:
    """The log moment at t = 0, 1, 2, ...: up to `largest`, or as far as the orders and nodes go."""
    most = 2 ** math.ceil(math.log2(min(largest, _MOST_ORDERS - 2) + 2))
    if direction == "remove":
        return _powers(scale, bins, most)
    while (known := _inverse_powers(scale, bins, most)) is None:
        most //= 2
        if most == 1:
            return np.zeros(1)
    return known


@functools.lru_cache(maxsize=64)
def _powers(scale: float, bins: int, most: int) -> Array:
    """log E_Q R^(1 + t) for t = 0 .. most - 1."""
    k = np.arange(most + 1, dtype=np.float64)
    series = k * (k - 1) / (2 * scale * scale) - special.gammaln(k + 1) - k * math.log(bins)
    total: Array | None = None
    left = bins
    while True:
        if left & 1:
            total = series if total is None else _product(total, series)
        left >>= 1
        if not left:
            assert total is not None
            moments: Array = (total + special.gammaln(k + 1))[1:]
            return moments
        series = _product(series, series)


def _product(a: Array, b: Array) -> Array:
    """Logs of the product of two power series, from the logs of their coefficients, to the same order."""
    size = len(a)
    product = np.empty(size)
    for n in range(size):
        terms = a[: n + 1] + b[n::-1]
        top = terms.max()
        product[n] = top + math.log(np.exp(terms - top).sum())
    return product


@functools.lru_cache(maxsize=64)
def _inverse_powers(scale: float, bins: int, most: int) -> Array | None:
    """log E_Q R^-t for t = 0 .. most - 1; None if that took too many nodes."""
    precision = 1 / scale / scale
    # v = log u, from where e^(t v) is negligible at t = 1 to where phi(u / T)^T is at the largest t.
    highest = math.log(2 * most + 60) + precision / 2 + most / bins * precision + _TAIL / scale / math.sqrt(bins)
    v_step = min(0.25, 0.5 / math.sqrt(most))
    v = np.arange(-42.0, highest, v_step)
    z_step = min(0.35, 0.2 * scale)
    z = np.arange(-_TAIL - 2 * most / bins / scale, _TAIL + z_step, z_step)
    if len(v) * len(z) > _CELLS:
        return None
    weight = np.exp(-z * z / 2)
    weight /= weight.sum()
    ratio = np.exp(z / scale - precision / 2)
    log_phi = np.empty(len(v))
    for start in range(0, len(v), 256):
        part = slice(start, start + 256)
        exponents = -np.multiply.outer(np.exp(v[part]) / bins, ratio)
        less = np.expm1(exponents) @ weight
        with np.errstate(divide="ignore", under="ignore"):
            log_phi[part] = np.where(less > -0.5, np.log1p(np.maximum(less, -0.5)), np.log(np.exp(exponents) @ weight))
    log_phi *= bins
    t = np.arange(1, most, dtype=np.float64)
    exponents = np.multiply.outer(t, v) + log_phi
    return np.append(0.0, special.logsumexp(exponents, axis=1) + math.log(v_step) - special.gammaln(t))
