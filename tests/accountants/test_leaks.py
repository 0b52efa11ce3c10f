"""Beyond the greatest finite loss, delta is the probability that everything was revealed."""

from __future__ import annotations

import math

import mpmath
import pytest

from accountants import EpsilonDelta, Event, Gaussian, Interval, Laplace, PoissonSampled, PRVAccountant, interval


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 40.0])
def test_pure_leaks_compose_to_one_minus_all_keep_silent(epsilon: float) -> None:
    leak, count = 1e-6, 300
    low, high = PRVAccountant().compose(EpsilonDelta(0.0, leak), count).delta_interval(epsilon)
    exact = float(-mpmath.expm1(count * mpmath.log1p(-mpmath.mpf(leak))))
    assert low <= exact * (1 + 1e-15)
    assert high >= exact * (1 - 1e-15)
    assert high - low <= 1e-10 * exact


def test_an_epsilon_exists_only_above_what_leaks() -> None:
    leaks = PRVAccountant().compose(EpsilonDelta(0.0, 1e-6), 3)
    assert leaks.interval(3e-6) == Interval(0.0, 0.0)
    assert leaks.interval(2.9e-6) == Interval(math.inf, math.inf)


@pytest.mark.parametrize(
    ("event", "greatest", "leaked"),
    [
        (EpsilonDelta(0.3, 1e-7) * 5 + EpsilonDelta(0.1, 2e-7) * 2, 1.7, 1 - (1 - 1e-7) ** 5 * (1 - 2e-7) ** 2),
        (Laplace(2.0) * 4, 2.0, 0.0),
    ],
    ids=["approximate", "pure"],
)
def test_delta_beyond_all_losses_is_what_leaks(event: Event, greatest: float, leaked: float) -> None:
    accountant = PRVAccountant().compose(event)
    low, high = accountant.delta_interval(greatest * 1.001)
    assert low <= leaked * (1 + 1e-9)
    assert leaked * (1 - 1e-9) <= high <= leaked * (1 + 1e-9)
    assert accountant.delta_interval(greatest * 0.9).upper > max(leaked * 1.01, 1e-7)


@pytest.mark.parametrize("sigma", [1e-3, 0.02, 0.1])
@pytest.mark.parametrize("rate", [1e-7, 0.1, 1.0])
def test_one_step_is_tight_where_masses_underflow(sigma: float, rate: float) -> None:
    """mpmath at 60 digits: P(loss > eps) - e^eps Q(loss > eps) at the reported ends is delta."""
    delta = 1e-9
    low, high = interval(noise_multiplier=sigma, sample_rate=rate, steps=1, delta=delta)
    assert high - low <= 1e-9 * high
    with mpmath.workdps(60):
        q, s = mpmath.mpf(rate), mpmath.mpf(sigma)

        def exact(epsilon: float) -> mpmath.mpf:
            ratio = (mpmath.exp(epsilon) - 1 + q) / q
            x = s * s * mpmath.log(ratio) + mpmath.mpf(1) / 2
            absent, present = mpmath.ncdf(-x / s), mpmath.ncdf((1 - x) / s)
            return (1 - q) * absent + q * present - mpmath.exp(epsilon) * absent

        assert exact(low) >= delta * (1 - 1e-6)
        assert exact(high) <= delta * (1 + 1e-6)
        assert exact(high * 0.999) > delta * (1 + 1e-6)


def test_sampled_noise_in_a_composition_still_has_no_greatest_loss() -> None:
    event = EpsilonDelta(0.1, 1e-9) + PoissonSampled(0.1, Gaussian(1.0)) * 3
    assert PRVAccountant().compose(event).delta_interval(5.0).upper > 1.01e-9
