"""One step, in closed form: delta(eps) = P(loss > eps) - e^eps Q(loss > eps)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import optimize

from accountants.components.component import DIRECTIONS, Component, LossPair

_ROUNDING = 1e-14  # relative, of each of the two masses
_LARGEST_EPSILON = 1e9
_LEAST_MASS = 1e-290  # below this a mass has lost digits


def delta_bounds(component: Component, epsilon: float) -> tuple[float, float]:
    """Lower and upper bound on delta at epsilon, the larger of both directions; the component must have pairs."""
    lower = upper = 0.0
    for direction in DIRECTIONS:
        pair, witness = component.pair(direction), component.witness(direction)
        assert pair is not None
        low, high = _directed(pair, epsilon)
        if witness is None:
            low = 0.0
        elif witness != pair:
            low = _directed(witness, epsilon)[0]
        lower, upper = max(lower, low), max(upper, high)
    return lower, upper


def epsilon_bounds(component: Component, delta: float) -> tuple[float, float]:
    """Lower and upper bound on epsilon at delta, the larger of both directions; the component must have pairs."""
    top = 0.0
    for direction in DIRECTIONS:
        pair = component.pair(direction)
        assert pair is not None
        top = max(top, pair.tails(delta)[1])
    # The loss exceeds `top` with probability about delta; the margin covers the quantile's rounding.
    top = max(top * (1 + 1e-9), 0.0) + 1e-9
    return (
        _crossing(lambda e: delta_bounds(component, e)[0], delta, top, upper=False),
        _crossing(lambda e: delta_bounds(component, e)[1], delta, top, upper=True),
    )


def _directed(pair: LossPair, epsilon: float) -> tuple[float, float]:
    p, q = (float(mass[0]) for mass in pair.cells(np.array([epsilon, np.inf])))
    if p == 0:
        return 0.0, 0.0
    if q < _LEAST_MASS:
        return 0.0, min(1.0, p * (1 + _ROUNDING))
    scaled = math.exp(math.log(q) + epsilon)
    slack = _ROUNDING * (1 + epsilon) * (p + scaled)
    return max(0.0, p - scaled - slack), min(1.0, max(0.0, p - scaled) + slack)


def _crossing(bound: Callable[[float], float], delta: float, top: float, *, upper: bool) -> float:
    """Where `bound` falls to delta, rounded up or down."""

    def excess(epsilon: float) -> float:
        return math.log(max(bound(epsilon), 1e-320)) - math.log(delta)

    if excess(0.0) <= 0:
        return 0.0
    while excess(top) > 0:
        if top > _LARGEST_EPSILON:
            return math.inf if upper else 0.0  # infinite loss is likelier than delta
        top *= 1.01
    root = float(optimize.brentq(excess, 0.0, top, xtol=1e-300, rtol=1e-13))
    margin = 1e-13 * root
    while root > 0 and (excess(root) > 0 if upper else excess(root) < 0):
        root, margin = root + margin if upper else max(root - margin, 0.0), margin * 4
    return root
