"""Zero-concentrated differential privacy: two numbers that add up, for noise that no sampling amplifies.

A mechanism is (xi, rho)-zCDP if its Renyi divergence of every order a > 1 is at most xi + rho a, in both directions
[1, Definition 1.1]; xi and rho add under composition. With t = a - 1, every t > 0 proves [2, Proposition 12]

    epsilon(delta) <= xi + rho (1 + t) - log(1 + 1/t) + (log(1/delta) - log(1 + t)) / t
    log delta(epsilon) <= t (xi + rho (1 + t) - epsilon - log(1 + 1/t)) - log(1 + t)

Both right-hand sides have one stationary point, their minimum, which is the root of an increasing function:

    rho t^2 + log(1 + t) = log(1/delta)            2 rho t - log(1 + 1/t) = epsilon - xi - rho

so the best order is found wherever it lies. Any order gives a bound: an inexact root costs tightness, not soundness.

Example:
    >>> from accountants.events import Gaussian
    >>> accountant = ZCDPAccountant().compose(Gaussian(5.0), count=25)
    >>> round(accountant.rho, 9), round(accountant.epsilon(1e-5), 4)     # the tight epsilon is 4.3772
    (0.5, 4.7284)

References:
    [1] Bun, Steinke, Concentrated Differential Privacy: Simplifications, Extensions, and Lower Bounds, 2016.
        arXiv:1605.02065
    [2] Canonne, Kamath, Steinke, The Discrete Gaussian for Differential Privacy, 2020. arXiv:2004.00010
"""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize

from accountants import arguments
from accountants.accountant import Accountant
from accountants.components.component import Component
from accountants.components.finite import FiniteOutcomes
from accountants.components.labelled import Labelled
from accountants.components.moments_only import Concentrated
from accountants.components.sampled_noise import SampledNoise
from accountants.components.shift_mixture import ShiftMixture
from accountants.errors import ParameterError, UnsupportedEventError
from accountants.interval import Interval
from accountants.reduction.normal_form import NormalForm

_ROUNDING = 1e-13  # relative; the formulas are a handful of operations
_ITERATIONS = 5000  # more than halving takes across the range of a double
_SMALLEST = 1e-100  # of rho unless it is 0: smaller ones are taken as this, for the root finders' sake
_LARGEST = 1e100  # of rho and xi: beyond, nothing is private and squares leave the range of a double


def zcdp_epsilon(rho: float, delta: float, xi: float = 0.0) -> float:
    """The least epsilon that (xi, rho)-zCDP is known to imply at `delta`.

    Args:
        rho: >= 0, unit: nats per order.
        delta: in (0, 1).
        xi: >= 0, unit: nats.

    Returns:
        An upper bound, rounded up, in [0, inf].

    Raises:
        ParameterError: an argument out of range.

    Example:
        >>> round(zcdp_epsilon(0.5, 1e-5), 4)
        4.7284
    """
    rho, xi, delta = _size("rho", rho), _size("xi", xi), arguments.delta(delta)
    rho = max(rho, _SMALLEST) if rho > 0 else 0.0
    if max(rho, xi) > _LARGEST:
        return math.inf
    if rho == 0 and xi == 0:
        return 0.0
    t, target = best_moment_of_rho(rho, delta), -math.log(delta)
    terms = (xi, rho * (1 + t), -math.log1p(1 / t), (target - math.log1p(t)) / t)
    return max(0.0, math.fsum(terms) + _ROUNDING * math.fsum(map(abs, terms)))


def best_moment_of_rho(rho: float, delta: float) -> float:
    """t > 0 such that order 1 + t proves the least epsilon at `delta` for rho-zCDP: the root above."""
    target = -math.log(delta)
    top = math.expm1(target)  # where log(1 + t) alone reaches the target
    if rho > 0:
        top = min(top, math.sqrt(target / rho))

    def excess(t: float) -> float:
        return rho * t * t + math.log1p(t) - target

    return float(optimize.brentq(excess, 0.0, top * (1 + 1e-9), rtol=1e-12, maxiter=_ITERATIONS))


def zcdp_delta(rho: float, epsilon: float, xi: float = 0.0) -> float:
    """The least delta that (xi, rho)-zCDP is known to imply at `epsilon`.

    Args:
        rho: >= 0, unit: nats per order.
        epsilon: >= 0, finite.
        xi: >= 0, unit: nats.

    Returns:
        An upper bound, rounded up, in [0, 1].

    Raises:
        ParameterError: an argument out of range.

    Example:
        >>> zcdp_delta(0.5, zcdp_epsilon(0.5, 1e-5)) <= 1.00001e-5
        True
    """
    rho, xi, epsilon = _size("rho", rho), _size("xi", xi), min(arguments.epsilon(epsilon), _LARGEST)
    rho = max(rho, _SMALLEST) if rho > 0 else 0.0
    if max(rho, xi) > _LARGEST:
        return 1.0
    if rho == 0 and epsilon >= xi:
        return 0.0  # (epsilon, 0): the loss itself is at most xi
    beyond = epsilon - xi - rho

    def slope(u: float) -> float:
        return 2 * rho * math.exp(u) - float(np.logaddexp(0.0, -u)) - beyond

    # At the low end log(1 + 1/t) exceeds what the rest can reach, at the high end 2 rho t does.
    low = -(max(-beyond, 0.0) + 2 * rho + 1)
    high = math.log((max(beyond, 0.0) + 1) / rho + 1) if rho > 0 else -math.log(math.expm1(-beyond)) + 1
    t = math.exp(max(optimize.brentq(slope, low, high, xtol=1e-10, maxiter=_ITERATIONS), -700.0))
    terms = (t * (xi + rho * (1 + t) - epsilon), -t * math.log1p(1 / t), -math.log1p(t))
    return math.exp(min(0.0, math.fsum(terms) + _ROUNDING * math.fsum(map(abs, terms))))


class ZCDPAccountant(Accountant):
    """Upper bounds from rho (and xi) alone: for un-sampled noise, matrix mechanisms, and others' zCDP claims.

    For plain Gaussians PRVAccountant is exact, and this one is some 8 % above. Sampled Gaussians are not zCDP with a
    useful rho: they are refused. Proves no lower bound: `interval().lower` is 0.

    References:
        Bun, Steinke, 2016. arXiv:1605.02065; Canonne, Kamath, Steinke, 2020. arXiv:2004.00010 (the module has both).
    """

    @property
    def rho(self) -> float:
        """What has been composed so far, in nats per order; inf without noise.

        Raises:
            UnsupportedEventError: no proof of zCDP for what was composed.
        """
        form = self._normal_form()
        return math.inf if form.unbounded else _total(form)[1]

    @property
    def xi(self) -> float:
        """What has been composed so far beside rho, in nats; 0 for everything that is plain rho-zCDP.

        Raises:
            UnsupportedEventError: as for `rho`.
        """
        form = self._normal_form()
        return math.inf if form.unbounded else _total(form)[0]

    def _check(self, form: NormalForm) -> None:
        _total(form)

    def _epsilon_interval(self, form: NormalForm, delta: float) -> Interval:
        xi, rho = _total(form)
        return Interval(0.0, zcdp_epsilon(rho, delta, xi))

    def _delta_interval(self, form: NormalForm, epsilon: float) -> Interval:
        xi, rho = _total(form)
        return Interval(0.0, zcdp_delta(rho, epsilon, xi))


def concentration(component: Component) -> tuple[float, float]:
    """(xi, rho) of one mechanism, rounded up.

    Gaussian noise of std s, un-sampled, on answers r apart has rho = r^2 / (2 s^2) [1, Proposition 1.6], and so has
    discrete Gaussian noise [2]. A mechanism whose loss is at most e either way has rho = e^2 / 2
    [1, Proposition 1.4]: randomised response, and Laplace noise on a sample, e = log(1 + q (e^(1/b) - 1)).

    Raises:
        UnsupportedEventError: no rho is known for it.
    """
    match component:
        case Concentrated():
            return component.xi, component.rho
        case SampledNoise(noise="gaussian", rate=1.0):
            return _from_distance(1 / component.scale)
        case SampledNoise(noise="laplace"):
            return _from_distance(_sampled_loss(component.rate, 1 / component.scale))
        case ShiftMixture(noise="gaussian" | "discrete_gaussian", present=((there, _),), absent=((here, _),)):
            return _from_distance((there - here) / component.scale)
        case Labelled(parts=((_, only),)):
            return concentration(only)
        case FiniteOutcomes() if all(math.isfinite(outcome.loss) for outcome in component.outcomes):
            return _from_distance(max(abs(outcome.loss) for outcome in component.outcomes))
    raise UnsupportedEventError(
        f"no concentrated-privacy parameter is known for {component!r}: sampling amplifies moments of low order "
        "only. Use PRVAccountant or RDPAccountant."
    )


def _from_distance(distance: float) -> tuple[float, float]:
    """(0, distance^2 / 2), rounded up."""
    return 0.0, distance * distance / 2 * (1 + _ROUNDING)


def _sampled_loss(rate: float, loss: float) -> float:
    """The largest loss of a mechanism with largest loss `loss`, seen through Poisson sampling."""
    return math.log1p(rate * math.expm1(loss)) if rate < 1 and loss < 700 else loss


def _total(form: NormalForm) -> tuple[float, float]:
    parts = [(count, *concentration(component)) for component, count in form.counts]
    return math.fsum(n * xi for n, xi, _ in parts), math.fsum(n * rho for n, _, rho in parts)


def _size(name: str, value: object) -> float:
    remedy = "Give the zCDP parameter of the mechanism, for example 1 / (2 sigma^2) for Gaussian noise."
    number = arguments.real(name, value, remedy=remedy)
    if number < 0:
        raise ParameterError(f"{name} must be >= 0, got {number!r}. {remedy}")
    return number
