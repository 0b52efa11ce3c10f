"""Exact epsilon and delta of the Gaussian mechanism with sensitivity / std = mu [1, Theorem 8].

    delta(eps) = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)

References:
    [1] Balle, Wang, Improving the Gaussian Mechanism for Differential Privacy, 2018. arXiv:1805.06530
"""

from __future__ import annotations

import math

from scipy import optimize, special

ROUNDING = 1e-12  # relative; log_ndtr and the root finder are good to about 1e-14
_LEAST_DELTA = 1e-300  # what a delta that underflows is rounded up to
_FAR = 1e3  # e to minus this is 0 as a double


def log_delta(mu: float, epsilon: float) -> float:
    """log delta(epsilon) for mu > 0, accurate in relative terms wherever delta is above 1e-300."""
    near, far = special.log_ndtr(mu / 2 - epsilon / mu), epsilon + special.log_ndtr(-mu / 2 - epsilon / mu)
    if near == -math.inf:
        return -math.inf
    gap = float(far - near)
    if gap >= 0:
        return -math.inf  # rounding: delta is below 1e-15 of its own leading term
    return float(near) + math.log(-math.expm1(gap))


def delta_bounds(mu: float, epsilon: float) -> tuple[float, float]:
    """Lower and upper bound on delta, at most 1; relative width about 1e-11."""
    if mu == 0:
        return 0.0, 0.0
    near = float(special.log_ndtr(mu / 2 - epsilon / mu))
    # Subtracting two logarithms that agree to many digits loses them: the slack grows with their size.
    slack = ROUNDING * math.exp(min(near, 0.0)) * (1 + min(abs(near), _FAR))
    value = math.exp(log_delta(mu, epsilon))
    return max(0.0, value - slack), min(1.0, max(value + slack, _LEAST_DELTA))


def epsilon_bounds(mu: float, delta: float) -> tuple[float, float]:
    """Lower and upper bound on epsilon; relative width about 1e-11."""
    if mu == 0:
        return 0.0, 0.0
    target = math.log(delta)
    if log_delta(mu, 0.0) <= target:
        _lower, upper = delta_bounds(mu, 0.0)
        return 0.0, 0.0 if upper <= delta else _nudge(mu, delta, 0.0)[1]
    # Beyond this, Phi(mu/2 - eps/mu) alone is below delta.
    ceiling = mu * mu / 2 + mu * math.sqrt(-2 * target) + mu
    root = optimize.brentq(lambda e: log_delta(mu, e) - target, 0.0, ceiling, xtol=1e-300, rtol=1e-14)
    return _nudge(mu, delta, float(root))


def _nudge(mu: float, delta: float, root: float) -> tuple[float, float]:
    """Widen around the root until the bounds on delta lie on either side of the target."""
    width = ROUNDING * (root + mu * 1e-3)
    lower, upper = root, root
    while delta_bounds(mu, upper)[1] > delta:
        upper, width = root + width, width * 4
    width = ROUNDING * (root + mu * 1e-3)
    while lower > 0 and delta_bounds(mu, lower)[0] < delta:
        lower, width = max(0.0, root - width), width * 4
    return lower, upper
