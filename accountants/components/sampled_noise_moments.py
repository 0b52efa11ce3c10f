"""Moments of the likelihood ratio of one sampled mechanism, by quadrature: what Renyi accounting rests on.

With L(x) = 1 - q + q A(1)(x) / A(0)(x), the likelihood ratio of the sampled mixture to the noise alone,

    remove:  log E_P exp(t log L)  = log E_A(0) L^(1 + t)          P the mixture
    add:     log E_P exp(-t log L) = log E_A(0) L^(-t)             P the noise alone

and the Renyi divergence of order 1 + t is that over t. The Gaussian's integrand is analytic with Gaussian decay, so
the trapezoid rule converges faster than any power of its step [1]; Laplace noise is integrated panel by panel.

References:
    [1] Trefethen, Weideman, The Exponentially Convergent Trapezoidal Rule, SIAM Review 56(3), 2014.
    [2] Mironov, Talwar, Zhang, Renyi Differential Privacy of the Sampled Gaussian Mechanism, 2019. arXiv:1908.10530
"""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy import special

from accountants.components.component import Array, Direction

SLACK = 1e-10  # relative: added to every moment, above the quadrature's error (tests/accountants/test_rdp.py)
_TAIL = 12.0  # standard deviations kept each side: what is cut weighs exp(-72)
_NODES = 2**16  # the most nodes of one quadrature; beyond, a convexity bound stands in
_LEAST_LAPLACE = 1e-3  # below this scale, one step's pure epsilon of 1000 or more is bound enough
_PANEL_X, _PANEL_W = np.polynomial.legendre.leggauss(16)


def log_moments(noise: str, scale: float, rate: float, direction: Direction, t: Array) -> Array:
    """log E_P exp(t * privacy loss) of one step, for each t.

    Args:
        noise: "gaussian" or "laplace".
        scale: of the noise, over the sensitivity, > 0.
        rate: q in (0, 1].
        direction: which of the two data sets P is drawn from: "remove" has the example, "add" has not.
        t: moments, shape [M], > 0; the Renyi order is 1 + t.

    Returns:
        Upper bounds, shape [M], >= 0, relative error about 1e-10 (inf where it exceeds a double).
    """
    t = np.asarray(t, dtype=np.float64)
    if noise == "gaussian" and (rate == 1 or _step(scale, float(t.max())) is None):
        whole = t * (t + 1) / 2 / scale / scale
        # Convexity of the divergence in its first argument: E L^a <= 1 - q + q E (A(1)/A(0))^a.
        moments = whole if rate == 1 else np.logaddexp(math.log1p(-rate), math.log(rate) + whole)
        return moments * (1 + SLACK)
    if noise == "laplace" and scale < _LEAST_LAPLACE:
        # Pure differential privacy: the loss is at most log(1 - q + q e^(1 / scale)) <= 1 / scale.
        return t * (1 / scale) * (1 + SLACK)
    powers = 1 + t if direction == "remove" else -t
    log_weight, log_ratio, excess = _nodes(noise, scale, rate, direction, _bucket(float(t.max())))
    return np.maximum(log_expectation(powers, log_weight, log_ratio, excess), 0.0) * (1 + SLACK)


def log_expectation(powers: Array, log_weight: Array, log_ratio: Array, excess: Array) -> Array:
    """log E L^a, shape [M]; as log1p(E (L^a - 1 - a (L - 1))), since E L = 1, where that does not overflow."""
    exponents = np.multiply.outer(powers, log_ratio)
    moments = np.empty(len(powers))
    small = exponents.max(axis=1) < 600
    if small.any():
        terms = np.expm1(exponents[small])
        terms -= np.multiply.outer(powers[small], excess)
        moments[small] = np.log1p(np.maximum(terms @ np.exp(log_weight), 0.0))
    if not small.all():
        moments[~small] = special.logsumexp(exponents[~small] + log_weight, axis=1)
    return moments


def _bucket(largest: float) -> float:
    """`largest` rounded up to a power of two, so that nearby questions share their nodes."""
    return 2.0 ** math.ceil(math.log2(max(largest, 1.0)))


def _step(scale: float, largest: float) -> float | None:
    """Trapezoid step, None if it would take too many nodes.

    log L is singular at distance pi scale^2 from the real line (L = 0); the Gaussian itself allows 0.35 scale.
    """
    step = min(0.35 * scale, 0.7 * scale * scale)
    return step if (_bucket(largest) + 1 + 2 * _TAIL * scale) / step < _NODES else None


@functools.lru_cache(maxsize=256)
def _nodes(noise: str, scale: float, rate: float, direction: Direction, largest: float) -> tuple[Array, Array, Array]:
    """Quadrature nodes for moments up to `largest`: log weight under A(0), log L, and L - 1 (0 where it overflows)."""
    if noise == "gaussian":
        step = _step(scale, largest)
        assert step is not None
        low, high = (0.0, 1 + largest) if direction == "remove" else (-largest, 0.0)
        x = np.arange(low - _TAIL * scale, high + _TAIL * scale + step, step)
        log_weight = -x * x / (2 * scale * scale) - math.log(scale * math.sqrt(2 * math.pi) / step)
        loss = (2 * x - 1) / (2 * scale * scale)
    else:
        # Between the two centres; outside, the ratio is constant: one atom each side. High moments live within
        # scale / t of a centre, hence panels that halve towards both.
        finer = 0.5 ** np.arange(1, max(0, math.ceil(math.log2(largest / scale))) + 4)
        edges = np.unique(np.concatenate([np.linspace(0, 1, math.ceil(2 / scale) + 1), finer, 1 - finer]))
        half = np.diff(edges)[:, None] / 2
        x = (edges[:-1, None] + half * (1 + _PANEL_X)).ravel()
        panel_weight = (half * _PANEL_W).ravel() / (2 * scale)
        log_weight = np.concatenate([[math.log(0.5)], np.log(panel_weight) - x / scale, [math.log(0.5) - 1 / scale]])
        loss = np.concatenate([[-1 / scale], (2 * x - 1) / scale, [1 / scale]])
    log_ratio = loss if rate == 1 else np.logaddexp(math.log1p(-rate), math.log(rate) + loss)
    with np.errstate(over="ignore"):
        excess = rate * np.expm1(loss)
    near_zero = np.abs(excess) < 0.5
    log_ratio = np.where(near_zero, np.log1p(np.where(near_zero, excess, 0.0)), log_ratio)
    # Where L overflows, L^a for a = 1 + t does too, and the other branch of log_expectation is taken; for
    # a = -t, the mass there is far below the smallest double.
    excess = np.where(np.isfinite(excess), excess, 0.0)
    return log_weight, log_ratio, excess
