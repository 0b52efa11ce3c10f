"""Moments of the loss of a shift mixture, by quadrature or summation.

With R_P = P / A(0) and R_Q = Q / A(0) at an outcome, and r = log R,

    log E_P exp(t log P / Q) = log E_A(0) [R_P^(1 + t) R_Q^(-t)] = log(1 + E g)
    g = e^X - 1 - X + (1 + t) (r_P - R_P + 1) - t (r_Q - R_Q + 1),    X = (1 + t) r_P - t r_Q

since E R_P = E R_Q = 1: every part is of second order in a small sampling rate, so nothing cancels.

Gaussian noise: the integrand is analytic with Gaussian decay, so the trapezoid rule converges faster than any power
of its step [1]. The logarithm of A(0) R_P^(1 + t) R_Q^(-t) has derivative in [-x, H - x], H = (1 + t) max shift -
t min shift in standard deviations, so what lies d outside [0, H] weighs at most 2 Phi(-d) of the whole. The step is
halved until two results agree to 2e-11; the finer one's error is far below their difference. Discrete noise is the
same sum over whole steps, exact where the step is 1; Skellam's H is no larger, its tail is followed until it is
negligible. Laplace noise is integrated panel by panel between its kinks.

References:
    [1] Trefethen, Weideman, The Exponentially Convergent Trapezoidal Rule, SIAM Review 56(3), 2014.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
from scipy import special

from accountants.components.component import Array
from accountants.components.noise_laws import DISCRETE
from accountants.components.shift_mixture_law import Mixture, Weighted
from accountants.components.small_differences import exp_remainder, log_remainder

SLACK = 1e-10  # relative: added to every moment, above the sum's error (tests/accountants/test_shift_mixture.py)
_AGREED = 2e-11  # relative: two steps of the trapezoid rule that differ by less have converged
_TAIL = 12.0  # standard deviations kept each side: what is cut weighs exp(-72)
_LOG_TAIL = 80.0  # the same for Skellam noise: log of the greatest term over that at the end
_FEW_NODES = 400  # before halving
_MOST_NODES = 2**17  # of one sum; beyond, a simple bound stands in
_SMALL = 0.03  # below it, series replace differences
_LEAST_MOMENT = 1e-5  # below it, first orders in t cancel: the chord of the convex moments stands in
_LOG_OVERFLOW = 690.0  # of a term: sums of 131072 of them are still finite
_PANEL_X, _PANEL_W = np.polynomial.legendre.leggauss(16)


def log_moments(mixture: Mixture, t: Array) -> Array:
    """log E_P exp(t * privacy loss), P the mixture to the right.

    Args:
        mixture: P and Q.
        t: moments, shape [M], > 0.

    Returns:
        Upper bounds, shape [M], >= 0. Relative error about 1e-10 from t = 1e-5 on (1e-5 below) where the sum takes at
        most 131072 terms; beyond that, the greatest loss or convexity over the shifts, inf if neither helps.
    """
    t = np.asarray(t, dtype=np.float64)
    moments = np.empty(len(t))
    buckets = np.ceil(np.log2(np.maximum(t, 16.0)) / 2)  # nearby questions share their nodes
    for bucket in np.unique(buckets):
        here = buckets == bucket
        nodes = _nodes(mixture, 4.0**bucket)
        moments[here] = _bound(mixture, t[here]) if nodes is None else nodes.log_moments(t[here])
    return np.maximum(moments, 0.0) * (1 + SLACK)


class _Nodes:
    """Outcomes with their weight under A(0): a sum in place of E_A(0).

    Args:
        mixture: P and Q.
        x: outcomes, shape [N].
        log_weight: log weight of each, shape [N].
    """

    def __init__(self, mixture: Mixture, x: Array, log_weight: Array) -> None:
        self._log_weight, self._weight = log_weight, np.exp(log_weight)
        self._present, present_excess = self._relative(mixture, mixture.present, x)
        self._absent, absent_excess = self._relative(mixture, mixture.absent, x)
        self._first_present = self._second_order(self._present, present_excess)
        self._first_absent = self._second_order(self._absent, absent_excess)

    def log_moments(self, t: Array) -> Array:
        """log(1 + E g) for each t, shape [M]."""
        order = np.maximum(t, _LEAST_MOMENT)
        exponent = np.multiply.outer(1 + order, self._present)
        exponent -= np.multiply.outer(order, self._absent)
        log_terms = exponent + self._log_weight
        over = log_terms.max(axis=1) > _LOG_OVERFLOW
        terms = np.exp(np.minimum(log_terms, _LOG_OVERFLOW)) - self._weight * (1 + exponent)
        near = np.abs(exponent) < _SMALL
        terms[near] = np.broadcast_to(self._weight, near.shape)[near] * exp_remainder(exponent[near])
        excess = terms.sum(axis=1) + (1 + order) * self._first_present - order * self._first_absent
        moments = np.log1p(np.maximum(excess, 0.0))
        if over.any():
            moments[over] = special.logsumexp(log_terms[over], axis=1)
        bounds: Array = np.minimum(t / _LEAST_MOMENT, 1.0) * moments
        return bounds

    @staticmethod
    def _relative(mixture: Mixture, law: Weighted, x: Array) -> tuple[Array, Array]:
        """log R and R - 1, the first to full relative precision near 0, the second inf where it overflows."""
        excess = mixture.excess(law, x)
        near = np.abs(excess) < 0.5
        return np.where(near, np.log1p(np.where(near, excess, 0.0)), mixture.log_relative(law, x)), excess

    def _second_order(self, log_relative: Array, excess: Array) -> float:
        """E (log R - R + 1)."""
        near = np.abs(excess) < _SMALL
        series = self._weight * log_remainder(np.where(near, excess, 0.0))
        # The weight goes into the exponent: where R overflows, weight * R does not.
        direct = self._weight * (log_relative + 1) - np.exp(np.minimum(self._log_weight + log_relative, _LOG_OVERFLOW))
        return float(np.where(near, series, direct).sum())


def _bound(mixture: Mixture, t: Array) -> Array:
    """The greatest loss, t times; or, as the moment is jointly convex, that of independent shifts, revealed."""
    by_support = t * mixture.support[1]
    if mixture.noise in ("laplace", "skellam"):
        return by_support
    logs = []
    for present, weight in mixture.present:
        for absent, other in mixture.absent:
            distance = (present - absent) / mixture.scale
            # The discrete Gaussian's moments are at most the Gaussian's.
            logs.append(math.log(weight) + math.log(other) + t * (1 + t) / 2 * distance * distance)
    by_convexity: Array = functools.reduce(np.logaddexp, logs)
    return np.minimum(by_support, by_convexity)


def _nodes(mixture: Mixture, largest: float) -> _Nodes | None:
    """Nodes for moments up to `largest`; None if they would be too many."""
    low, high = _range(mixture, largest)
    few = (high - low) / _first_step(mixture) < _FEW_NODES
    return _few_nodes(mixture, largest) if few else _many_nodes(mixture, largest)


@functools.lru_cache(maxsize=4096)  # at most about 50 kB each
def _few_nodes(mixture: Mixture, largest: float) -> _Nodes | None:
    return _new_nodes(mixture, largest)


@functools.lru_cache(maxsize=32)  # at most 4 MB each
def _many_nodes(mixture: Mixture, largest: float) -> _Nodes | None:
    return _new_nodes(mixture, largest)


def _new_nodes(mixture: Mixture, largest: float) -> _Nodes | None:
    if mixture.noise == "laplace":
        return _laplace_nodes(mixture, largest)
    low, high = _range(mixture, largest)
    whole = mixture.noise in DISCRETE
    step = _first_step(mixture)
    trial = np.array([0.1, 1.0, math.sqrt(largest), largest])
    nodes, moments = None, np.full(len(trial), math.nan)
    while (high - low) / step < _MOST_NODES:
        x: Array = step * np.arange(math.floor(low / step), math.ceil(high / step) + 1, dtype=np.float64)
        log_pmf = mixture.log_pmf(x) if whole else -x * x / 2 - 0.5 * math.log(2 * math.pi)
        finer = _Nodes(mixture, x, log_pmf + math.log(step))
        previous, moments = moments, finer.log_moments(trial)
        if nodes is not None and np.all(np.abs(moments - previous) <= _AGREED * moments):
            return nodes
        if whole and step == 1:
            return finer
        nodes = finer
        step = max(step // 2, 1.0) if whole else step / 2
    return None


def _deviation(mixture: Mixture) -> float:
    """Standard deviation of A(0), in the mixture's unit."""
    return math.sqrt(mixture.scale) if mixture.noise == "skellam" else mixture.scale


def _first_step(mixture: Mixture) -> float:
    """Trapezoid step to start from; R has no zero within pi deviation^2 / shift of the real line."""
    deviation = _deviation(mixture)
    step = 0.5 * deviation * min(1.0, 2 * deviation / max(map(abs, mixture.hull)))
    return max(math.floor(step), 1.0) if mixture.noise in DISCRETE else step


def _range(mixture: Mixture, largest: float) -> tuple[float, float]:
    """Outcomes between which the moment's terms, P and Q are."""
    low, high = mixture.hull
    tail = _TAIL * _deviation(mixture)
    top = (1 + largest) * high - largest * low
    low, top = low - tail, top + tail
    if mixture.noise == "skellam" and top < _MOST_NODES * _deviation(mixture):
        # Poisson-like tails: go on until the terms are negligible.
        def log_term(x: float) -> float:
            at = np.array([x])
            present, absent = mixture.log_relative(mixture.present, at), mixture.log_relative(mixture.absent, at)
            return float((mixture.log_pmf(at) + (1 + largest) * present - largest * absent)[0])

        peak = max(log_term(math.floor(x)) for x in np.linspace(low, top, 65))
        while log_term(math.ceil(top)) > peak - _LOG_TAIL:
            top += tail + 1
        while log_term(math.floor(low)) > peak - _LOG_TAIL:
            low -= tail + 1
    return low, top


def _laplace_nodes(mixture: Mixture, largest: float) -> _Nodes | None:
    """Gauss-Legendre panels between the kinks, and the two constant ends; high moments live within 1 / t of a kink."""
    low, high = mixture.hull
    kinks = np.unique([0.0, *(shift for shift, _ in mixture.present + mixture.absent)])
    if 2 * (high - low) * len(_PANEL_X) > _MOST_NODES:
        return None
    pieces = [kinks]
    for left, right in itertools.pairwise(kinks):
        width = float(right - left)
        finer = width * 0.5 ** np.arange(1, max(0, math.ceil(math.log2(max(largest * width, 1.0)))) + 4)
        pieces += [np.linspace(left, right, math.ceil(2 * width) + 1), left + finer, right - finer]
    edges = np.unique(np.concatenate(pieces))
    half = np.diff(edges)[:, None] / 2
    x = (edges[:-1, None] + half * (1 + _PANEL_X)).ravel()
    if len(x) > _MOST_NODES:
        return None
    log_weight = np.log(0.5 * (half * _PANEL_W).ravel()) - np.abs(x)
    ends = math.log(0.5) + np.array([low, -high])
    return _Nodes(mixture, np.concatenate([[low], x, [high]]), np.concatenate([ends[:1], log_weight, ends[1:]]))
