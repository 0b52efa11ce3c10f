"""One step, in closed form: delta(eps) = P(loss > eps) - e^eps Q(loss > eps)."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy import optimize

from accountants.components.component import DIRECTIONS, Component, LossPair

_ROUNDING = 1e-14  # relative, of each of the two masses
_LARGEST_EPSILON = 1e9


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
    log_p, least, most = pair.log_tail(epsilon)
    if log_p == -math.inf:
        return 0.0, 0.0
    p = math.exp(min(log_p, 0.0))
    # P (1 - e^(eps + log Q - log P)), where P is at least e^eps Q up to rounding.
    low, high = (p * -math.expm1(min(epsilon + log_q - log_p, 0.0)) for log_q in (most, least))
    slack = _ROUNDING * (1 + epsilon + abs(log_p)) * p
    return max(0.0, low - slack), min(1.0, high + slack)


def _crossing(bound: Callable[[float], float], delta: float, top: float, *, upper: bool) -> float:
    """Where `bound` falls to delta, rounded up or down."""

    def excess(epsilon: float) -> float:
        return math.log(max(bound(epsilon), 1e-320)) - math.log(delta)

    if excess(0.0) <= 0:
        return 0.0
    while excess(top) > 0:
        if top > _LARGEST_EPSILON:
            return math.inf if upper else top  # infinite loss is likelier than delta
        top *= 1.01
    root = float(optimize.brentq(excess, 0.0, top, xtol=1e-300, rtol=1e-13))
    margin = 1e-13 * root
    while root > 0 and (excess(root) > 0 if upper else excess(root) < 0):
        root, margin = root + margin if upper else max(root - margin, 0.0), margin * 4
    return root
