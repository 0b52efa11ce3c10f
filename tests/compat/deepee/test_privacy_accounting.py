"""deepee's accounting functions: bounds where they are bounds, estimates that say so where they are not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from accountants import Estimate
from dpdl.compat.deepee.privacy_accounting import (
    compute_eps_uniform,
    compute_mu_uniform,
    compute_rdp,
    delta_eps_mu,
    eps_from_mu,
    get_privacy_spent,
)


def test_the_bound_is_above_what_one_pair_of_neighbours_loses() -> None:  # D12
    """Without sampling, a batch of everything: replacing an example moves a Gaussian by two clip norms."""
    for steps in (1, 4):
        sigma, delta = 8.0, 1e-5
        epsilon = compute_eps_uniform(steps, sigma, 100, 100, delta)
        mu = 2 / sigma * math.sqrt(steps)
        exact = norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)
        assert exact <= delta * (1 + 1e-9)
        assert exact == pytest.approx(delta, rel=1e-5)


def test_what_deepee_reports_is_an_estimate_and_below_the_bound() -> None:  # D12
    limit = eps_from_mu(compute_mu_uniform(10, 1.0, 50_000, 200), 1e-5)
    assert isinstance(limit, Estimate)
    assert float(limit) == pytest.approx(1.308, abs=1e-3)  # research figure of deepee 0.1.9
    bound = compute_eps_uniform(10, 1.0, 50_000, 200, 1e-5)
    assert not isinstance(bound, Estimate)
    assert bound > 7 * float(limit)


def test_a_part_of_a_step_counts_as_one_and_rounding_does_not() -> None:
    whole = compute_eps_uniform(3 * 0.01, 2.0, 1000, 10, 1e-5)  # 3.0000000000000004 steps in floats
    assert whole == compute_eps_uniform(0.03, 2.0, 1000, 10, 1e-5) < compute_eps_uniform(0.0301, 2.0, 1000, 10, 1e-5)
    assert compute_eps_uniform(0, 2.0, 1000, 10, 1e-5) == 0.0


@pytest.mark.parametrize("bad", [(1, 0.001, 60_000, 200, 1e-5), (1, 0.0, 100, 10, 1e-5), (1, 1.0, 10, 20, 1e-5)])
def test_implausible_and_impossible_values_are_value_errors(bad: tuple[float, float, int, int, float]) -> None:
    with pytest.raises(ValueError, match=r"above 500|batch_size"):
        compute_eps_uniform(*bad)


def test_gaussian_privacy_and_back() -> None:
    assert delta_eps_mu(eps_from_mu(0.7, 1e-5), 0.7) == pytest.approx(1e-5, rel=1e-6)
    expected = norm.cdf(-1 / 0.7 + 0.35) - math.e * norm.cdf(-1 / 0.7 - 0.35)
    assert delta_eps_mu(1.0, 0.7) == pytest.approx(expected, rel=1e-9)
    assert isinstance(delta_eps_mu(1.0, Estimate(0.7)), Estimate)
    for mu in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="mu"):
            eps_from_mu(mu, 1e-5)


@pytest.mark.parametrize("order", [2, 5.5, 16])
def test_renyi_divergence_of_a_poisson_sampled_gaussian(order: float) -> None:
    rate, sigma, steps = 0.1, 1.5, 10

    def integrand(z: float) -> float:
        ratio = 1 - rate + rate * math.exp((2 * z - 1) / (2 * sigma**2))
        return float(ratio**order * norm.pdf(z, scale=sigma))

    moment = quad(integrand, -30, 50, limit=500)[0]
    expected = steps * math.log(moment) / (order - 1)
    assert compute_rdp(rate, sigma, steps, float(order)) == pytest.approx(expected, rel=1e-5)
    several = compute_rdp(rate, sigma, steps, [order, order + 1])
    assert isinstance(several, np.ndarray)
    assert several[0] == pytest.approx(expected, rel=1e-5)


def test_the_best_order_is_taken() -> None:
    orders, spent = [2.0, 4.0, 64.0], np.array([0.5, 1.0, 16.0])
    candidates = [r + math.log(1e5) / (a - 1) for a, r in zip(orders, spent, strict=True)]
    assert get_privacy_spent(orders, spent, 1e-5) == (pytest.approx(min(candidates)), 4.0)
    assert get_privacy_spent(2.0, math.nan, 1e-5)[0] == math.inf
    with pytest.raises(ValueError, match="same length"):
        get_privacy_spent(orders, spent[:2], 1e-5)
    with pytest.raises(ValueError, match="delta"):
        get_privacy_spent(orders, spent, 0.0)
