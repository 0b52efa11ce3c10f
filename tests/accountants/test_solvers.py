"""Plans from budgets: on the safe side, and close to it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accountants
from accountants import ParameterError, UnsupportedEventError

WITHIN = 1e-5  # relative: a few times the bracket that the solvers promise, as epsilon is itself known to about 1e-6


@pytest.mark.parametrize("name", ["prv", "rdp"])
@settings(max_examples=8, deadline=None)
@given(
    epsilon=st.floats(0.1, 20.0),
    rate=st.floats(1e-3, 0.5),
    steps=st.integers(10, 20_000),
    exponent=st.floats(-9, -4),
)
def test_noise_is_enough_and_a_little_less_is_not(
    name: str, epsilon: float, rate: float, steps: int, exponent: float
) -> None:
    plan = {"sample_rate": rate, "steps": steps, "delta": 10.0**exponent, "accountant": name}
    sigma = accountants.noise_multiplier(epsilon=epsilon, **plan)
    assert accountants.epsilon(noise_multiplier=sigma, **plan) <= epsilon
    if sigma > 0.011:
        assert accountants.epsilon(noise_multiplier=sigma * (1 - WITHIN), **plan) > epsilon


def test_noise_multiplier_equals_a_tight_peer() -> None:
    # The tight value, by contour integration: 1.564966; see the golden rows for the accountant itself.
    sigma = accountants.noise_multiplier(epsilon=3.0, delta=1e-5, sample_rate=0.01, steps=10_000)
    assert 1.564966 <= sigma <= 1.564966 * (1 + WITHIN)


@pytest.mark.parametrize("name", ["prv", "rdp", "gdp"])
def test_full_batch_noise_works_with_every_accountant(name: str) -> None:
    plan = {"sample_rate": 1.0, "steps": 100, "delta": 1e-6, "accountant": name}
    sigma = accountants.noise_multiplier(epsilon=2.0, **plan)
    assert accountants.epsilon(noise_multiplier=sigma, **plan) <= 2.0
    assert accountants.epsilon(noise_multiplier=sigma * (1 - WITHIN), **plan) > 2.0


def test_no_release_needs_no_noise() -> None:
    assert accountants.noise_multiplier(epsilon=1.0, delta=1e-5, sample_rate=0.1, steps=0) == 0.0
    assert accountants.noise_multiplier(epsilon=1.0, delta=1e-5, sample_rate=0.0, steps=9) == 0.0


def test_an_impossible_budget_is_refused_with_a_remedy() -> None:
    with pytest.raises(ParameterError, match=r"out of reach.*fewer steps"):
        accountants.noise_multiplier(epsilon=0.0, delta=1e-15, sample_rate=1.0, steps=10**7)


@pytest.mark.parametrize("name", ["prv", "rdp"])
def test_steps_are_the_most_that_fit(name: str) -> None:
    plan = {"noise_multiplier": 1.3, "sample_rate": 0.02, "delta": 1e-6, "accountant": name}
    count = accountants.steps(epsilon=2.5, **plan)
    assert accountants.epsilon(steps=count, **plan) <= 2.5 < accountants.epsilon(steps=count + 1, **plan)


def test_steps_are_zero_when_one_is_too_many() -> None:
    assert accountants.steps(epsilon=0.1, delta=1e-6, noise_multiplier=0.5, sample_rate=1.0) == 0
    assert accountants.steps(epsilon=0.1, delta=1e-6, noise_multiplier=0.0, sample_rate=0.5) == 0


def test_unlimited_steps_are_refused() -> None:
    with pytest.raises(ParameterError, match="any number of steps"):
        accountants.steps(epsilon=1.0, delta=1e-5, noise_multiplier=1.0, sample_rate=0.0)


@pytest.mark.parametrize("name", ["prv", "rdp"])
@settings(max_examples=8, deadline=None)
@given(
    epsilon=st.floats(1.0, 10.0),
    sigma=st.floats(1.0, 4.0),  # with less noise, Rényi moments leave no rate for some of these budgets
    steps=st.integers(10, 20_000),
    exponent=st.floats(-9, -4),
)
def test_the_rate_is_affordable_and_a_little_more_is_not(
    name: str, epsilon: float, sigma: float, steps: int, exponent: float
) -> None:
    plan = {"noise_multiplier": sigma, "steps": steps, "delta": 10.0**exponent, "accountant": name}
    rate = accountants.sample_rate(epsilon=epsilon, **plan)
    assert accountants.epsilon(sample_rate=rate, **plan) <= epsilon
    if rate < 1:
        assert accountants.epsilon(sample_rate=min(rate * (1 + WITHIN), 1.0), **plan) > epsilon


@pytest.mark.parametrize("relation", ["add_or_remove", "replace_one", "zero_out"])
def test_the_rate_is_that_of_its_relation(relation: str) -> None:
    plan = {"noise_multiplier": 1.5, "steps": 20, "delta": 1e-6, "relation": relation}
    rate = accountants.sample_rate(epsilon=1.0, **plan)
    spent = accountants.epsilon(sample_rate=rate, **plan)
    assert 1 - 1e-4 < spent <= 1


def test_the_rate_undoes_the_noise() -> None:
    plan = {"steps": 2_000, "delta": 1e-6, "epsilon": 2.0}
    sigma = accountants.noise_multiplier(sample_rate=0.013, **plan)
    assert accountants.sample_rate(noise_multiplier=sigma, **plan) == pytest.approx(0.013, rel=2 * WITHIN)


def test_a_budget_of_zero_has_a_rate_where_delta_pays_for_it() -> None:
    plan = {"noise_multiplier": 1.0, "steps": 1, "delta": 1e-3}
    rate = accountants.sample_rate(epsilon=0.0, **plan)
    assert accountants.epsilon(sample_rate=rate, **plan) == 0
    assert accountants.epsilon(sample_rate=rate * (1 + 1e-3), **plan) > 0


@pytest.mark.parametrize("name", ["prv", "rdp", "gdp"])
def test_everyone_may_be_sampled_where_that_is_affordable(name: str) -> None:
    plan = {"noise_multiplier": 50.0, "steps": 10, "delta": 1e-5, "accountant": name}
    assert accountants.sample_rate(epsilon=2.0, **plan) == 1.0
    assert accountants.epsilon(sample_rate=1.0, **plan) <= 2.0


def test_a_rate_out_of_reach_is_refused_with_a_remedy() -> None:
    for noise in (0.0, 0.05):
        with pytest.raises(ParameterError, match=r"out of reach.*Add noise"):
            accountants.sample_rate(epsilon=0.01, delta=1e-15, noise_multiplier=noise, steps=10**7)


@pytest.mark.parametrize("question", ["noise_multiplier", "steps", "sample_rate", "epsilon_curve"])
def test_an_estimate_makes_no_plan(question: str) -> None:
    plan = {"noise_multiplier": 1.0, "steps": 100, "sample_rate": 0.01, "delta": 1e-5}
    if question == "epsilon_curve":
        plan["steps"] = [100]
    else:
        plan |= {"epsilon": 1.0}
        del plan[question]
    with pytest.raises(UnsupportedEventError):
        getattr(accountants, question)(**plan, accountant="gdp")
