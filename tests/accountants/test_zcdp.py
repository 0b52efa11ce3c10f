"""Concentrated privacy: the conversion against high-precision minimisation, and never below the exact Gaussian."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accountants import Gaussian, Laplace, ParameterError, PoissonSampled, PRVAccountant, RDPAccountant
from accountants.components.component import DIRECTIONS, Component
from accountants.components.finite import FiniteOutcomes, Outcome
from accountants.components.moments_only import Concentrated
from accountants.components.sampled_noise import SampledNoise
from accountants.components.shift_mixture import ShiftMixture
from accountants.engines.gaussian import delta_bounds, epsilon_bounds
from accountants.errors import UnsupportedEventError
from accountants.interval import Interval
from accountants.relation import NeighboringRelation
from accountants.zcdp_accountant import ZCDPAccountant, concentration, zcdp_delta, zcdp_epsilon

CASES = [
    (0.5, 1e-5, 0.0),
    (1e-6, 1e-5, 0.0),
    (1e-3, 1e-12, 0.0),
    (40.0, 1e-6, 0.0),
    (3e4, 1e-9, 0.0),
    (0.1, 0.3, 0.0),
    (0.2, 1e-6, 0.7),
    (1e-4, 1e-3, 2.0),
]


def minimum(objective) -> mpmath.mpf:  # type: ignore[no-untyped-def]
    """Golden-section search over u = log t, to 25 digits, started from a grid wide enough for every case."""
    grid = [mpmath.mpf(k) / 4 for k in range(-160, 161)]
    values = [objective(mpmath.exp(u)) for u in grid]
    at = values.index(min(values))
    assert 0 < at < len(grid) - 1
    low, high, ratio = grid[at - 1], grid[at + 1], (mpmath.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if objective(mpmath.exp(left)) < objective(mpmath.exp(right)):
            high = right
        else:
            low = left
    return objective(mpmath.exp((low + high) / 2))


@pytest.mark.parametrize(("rho", "delta", "xi"), CASES)
def test_epsilon_is_the_conversion_at_the_best_order(rho: float, delta: float, xi: float) -> None:
    with mpmath.workdps(40):
        r, d, x = (mpmath.mpf(v) for v in (rho, delta, xi))

        def proved(t: mpmath.mpf) -> mpmath.mpf:
            a = 1 + t
            return x + r * a + mpmath.log((a - 1) / a) - (mpmath.log(d) + mpmath.log(a)) / (a - 1)

        truth = max(minimum(proved), mpmath.mpf(0))
    ours = zcdp_epsilon(rho, delta, xi)
    assert float(truth) <= ours <= float(truth) * (1 + 1e-11) + 1e-11


@pytest.mark.parametrize(("rho", "epsilon", "xi"), [(0.5, 3.0, 0.0), (1e-3, 0.2, 0.0), (40.0, 1.0, 0.0),
                                                    (1e3, 1500.0, 0.0), (0.1, 2.0, 0.5), (0.1, 0.2, 0.5)])  # fmt: skip
def test_delta_is_the_conversion_at_the_best_order(rho: float, epsilon: float, xi: float) -> None:
    with mpmath.workdps(40):
        r, e, x = (mpmath.mpf(v) for v in (rho, epsilon, xi))

        def proved(t: mpmath.mpf) -> mpmath.mpf:
            a = 1 + t
            return (a - 1) * (x + r * a - e) + (a - 1) * mpmath.log((a - 1) / a) - mpmath.log(a)

        truth = min(mpmath.exp(minimum(proved)), mpmath.mpf(1))
    assert float(truth) <= zcdp_delta(rho, epsilon, xi) <= float(truth) * (1 + 1e-10)


@settings(max_examples=100, deadline=None)
@given(st.floats(-3, 3), st.floats(-14, -0.5))
def test_never_below_the_exact_gaussian(log_mu: float, log_delta: float) -> None:
    mu, delta = 10**log_mu, 10**log_delta
    ours = zcdp_epsilon(mu * mu / 2, delta)
    assert ours >= epsilon_bounds(mu, delta)[0]
    assert zcdp_delta(mu * mu / 2, ours) <= delta * (1 + 1e-6)
    assert zcdp_delta(mu * mu / 2, ours) >= delta_bounds(mu, ours)[0]


def test_never_below_pure_privacy_of_the_same_epsilon() -> None:
    # Randomised response with loss xi attains delta = (e^xi - e^eps) / (1 + e^xi); every rho covers it with that xi.
    for xi, epsilon in [(1.0, 0.3), (5.0, 4.9), (0.01, 0.0)]:
        attained = (math.exp(xi) - math.exp(epsilon)) / (1 + math.exp(xi))
        assert attained <= zcdp_delta(0.0, epsilon, xi) <= 1


def test_limits() -> None:
    assert zcdp_epsilon(0.0, 1e-5) == 0.0
    assert zcdp_delta(0.0, 0.0) == 0.0
    assert zcdp_delta(0.0, 1.0, xi=1.0) == 0.0
    assert zcdp_epsilon(0.0, 1e-9, xi=1.0) == pytest.approx(1.0, abs=1e-8)
    assert zcdp_epsilon(math.inf, 1e-5) == math.inf
    assert zcdp_delta(math.inf, 1.0) == 1.0
    assert zcdp_delta(1e6, 0.0) == 1.0
    assert 0 < zcdp_epsilon(1e-16, 1e-15) < 1e-6
    for call in (lambda: zcdp_epsilon(-1.0, 1e-5), lambda: zcdp_epsilon(1.0, 0.0), lambda: zcdp_delta(1.0, 1.0, xi=-1)):
        with pytest.raises(ParameterError):
            call()


def test_rho_adds_over_different_gaussians_in_any_order() -> None:
    one = ZCDPAccountant().compose(Gaussian(2.0), 3).compose(Gaussian(5.0), 10)
    other = ZCDPAccountant().compose(Gaussian(5.0), 10).compose(Gaussian(2.0), 3)
    assert one.rho == other.rho == pytest.approx(3 / 8 + 10 / 50, rel=1e-11)
    assert one.xi == 0
    assert one.epsilon(1e-6) == pytest.approx(zcdp_epsilon(3 / 8 + 10 / 50, 1e-6), rel=1e-11)


def test_gaussians_cost_what_renyi_accounting_says() -> None:
    # The same orders, the same conversion: only the search for the order differs.
    event = Gaussian(3.0)
    ours, theirs = (a.compose(event, 7).epsilon(1e-7) for a in (ZCDPAccountant(), RDPAccountant()))
    assert ours == pytest.approx(theirs, rel=1e-7)


def test_replacing_doubles_the_distance() -> None:
    assert ZCDPAccountant(relation=NeighboringRelation.REPLACE_ONE).compose(Gaussian(2.0)).rho == pytest.approx(0.5)


def test_laplace_is_covered_by_its_largest_loss() -> None:
    for event in (Laplace(2.0), PoissonSampled(0.3, Laplace(0.7))):
        spent = ZCDPAccountant().compose(event, 50)
        assert spent.epsilon(1e-6) >= PRVAccountant().compose(event, 50).interval(1e-6).lower
        assert spent.delta(1.0) >= PRVAccountant().compose(event, 50).delta_interval(1.0).lower


KNOWN = [
    (Concentrated(rho=0.2, xi=0.1), 0.1, 0.2),
    (SampledNoise("gaussian", 3.0, 1.0), 0.0, 1 / 18),
    (SampledNoise("laplace", 2.0, 1.0), 0.0, 1 / 8),
    (ShiftMixture("discrete_gaussian", 6.0, ((4.0, 1.0),), ((0.0, 1.0),)), 0.0, 16 / 72),
    (FiniteOutcomes((Outcome(0.75, 0.25, math.log(3)), Outcome(0.25, 0.75, -math.log(3)))), 0.0, math.log(3) ** 2 / 2),
]


@pytest.mark.parametrize(("component", "xi", "rho"), KNOWN, ids=lambda value: type(value).__name__)
def test_each_mechanism_s_divergence_is_within_its_line(component: Component, xi: float, rho: float) -> None:
    assert concentration(component) == (xi, pytest.approx(rho, rel=1e-12))
    t = np.geomspace(1e-3, 1e3, 40)
    for direction in DIRECTIONS:
        assert np.all(component.log_moments(direction, t) <= t * (xi + rho * (1 + t)) * (1 + 1e-6))


UNKNOWN = [
    SampledNoise("gaussian", 3.0, 0.5),
    ShiftMixture("discrete_gaussian", 6.0, ((0.0, 0.5), (4.0, 0.5)), ((0.0, 1.0),)),
    FiniteOutcomes((Outcome(0.1, 0.0, math.inf), Outcome(0.9, 1.0, math.log(0.9)))),
]


@pytest.mark.parametrize("component", UNKNOWN, ids=lambda value: type(value).__name__)
def test_what_is_amplified_or_may_fail_has_no_rho(component: Component) -> None:
    with pytest.raises(UnsupportedEventError, match="RDPAccountant"):
        concentration(component)


def test_nothing_noiseless_and_sampled() -> None:
    assert ZCDPAccountant().interval(1e-5) == Interval(0.0, 0.0)
    bare = ZCDPAccountant().compose(Gaussian(0.0))
    assert (bare.rho, bare.epsilon(1e-5), bare.delta(1.0)) == (math.inf, math.inf, 1.0)
    with pytest.raises(UnsupportedEventError, match="RDPAccountant"):
        ZCDPAccountant().compose(PoissonSampled(0.1, Gaussian(1.0)))
