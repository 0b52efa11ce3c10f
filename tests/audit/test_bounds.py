"""Bounds against exact enumeration: probabilities are summed over all outcomes, in fractions or by the definition."""

from __future__ import annotations

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest

from dpdl.audit import bounds
from dpdl.errors import ParameterError


def binomial(n: int, p: Fraction | float) -> list[Fraction]:
    """Exact probabilities of 0, ..., n."""
    p = Fraction(p)
    return [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


# ── rates ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (9, 10), (10, 10), (1, 90)])
@pytest.mark.parametrize("failure", [0.3, 0.05, 1e-6])
def test_limits_of_a_rate_are_where_the_tail_is_the_failure(successes: int, trials: int, failure: float) -> None:
    high = bounds.rate_at_most(successes, trials, failure=failure)
    low = bounds.rate_at_least(successes, trials, failure=failure)
    if successes < trials:
        assert float(sum(binomial(trials, high)[: successes + 1])) == pytest.approx(failure, rel=1e-4)
    else:
        assert high == 1
    if successes:
        assert float(sum(binomial(trials, low)[successes:])) == pytest.approx(failure, rel=1e-5)
    else:
        assert low == 0


def test_limits_cover_for_every_rate_and_not_by_being_idle() -> None:
    n, failure = 40, 0.05
    limits = [bounds.rate_at_most(k, n, failure=failure) for k in range(n + 1)]
    missed = [float(sum(p for p, limit in zip(binomial(n, r), limits, strict=True) if limit < r)) for r in
              np.linspace(0.01, 0.99, 99)]  # fmt: skip
    assert max(missed) <= failure
    assert max(missed) > 0.9 * failure  # at some rate it is nearly reached


def test_both_limits_fail_half_as_often_each() -> None:
    low, high = bounds.clopper_pearson(7, 30, confidence=0.9)
    assert low == pytest.approx(bounds.rate_at_least(7, 30, failure=0.05))
    assert high == pytest.approx(bounds.rate_at_most(7, 30, failure=0.05))


# ── epsilon from two rates ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.2])
def test_randomised_response_is_read_exactly(epsilon: float, delta: float) -> None:
    wrong = (1 - delta) / (1 + math.exp(epsilon))  # reveals the truth with probability delta
    assert bounds.epsilon_of_rates(wrong, wrong, delta=delta) == pytest.approx(epsilon)


def test_of_the_two_directions_the_better_counts_and_useless_tests_give_nothing() -> None:
    assert bounds.epsilon_of_rates(0.01, 0.5, delta=0.0) == bounds.epsilon_of_rates(0.5, 0.01, delta=0.0)
    assert bounds.epsilon_of_rates(0.01, 0.5, delta=0.0) == pytest.approx(math.log(50))
    assert bounds.epsilon_of_rates(0.5, 0.6, delta=0.0) == 0
    assert bounds.epsilon_of_rates(0.0, 0.5, delta=0.1) == math.inf
    assert bounds.epsilon_of_rates(0.0, 0.95, delta=0.1) == 0


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("threshold", [-0.5, 0.5, 1.7])
def test_mu_of_a_gaussian_is_read_at_any_threshold(mu: float, threshold: float) -> None:
    fpr, fnr = 1 - NormalDist().cdf(threshold), NormalDist(mu).cdf(threshold)
    assert bounds.mu_of_rates(fpr, fnr) == pytest.approx(mu)


@pytest.mark.parametrize("mu", [0.2, 1.0, 3.0])
def test_epsilon_of_mu_by_the_closed_form(mu: float) -> None:
    epsilon, phi = bounds.epsilon_of_mu(mu, delta=1e-3), NormalDist().cdf
    assert phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu) == pytest.approx(1e-3, rel=1e-6)
    assert bounds.mu_of_epsilon(epsilon, delta=1e-3) == pytest.approx(mu)


# ── one run ─────────────────────────────────────────────────────────────────────────────────────────


def p_value(right: int, guesses: int, candidates: int, epsilon: float, delta: float) -> float:
    """By the definition: all i, all outcomes, in fractions (e^eps as the float that it is)."""
    q = Fraction(math.exp(epsilon)) / (1 + Fraction(math.exp(epsilon)))
    law = binomial(guesses, q)
    share = max(sum(law[max(0, right - i) : right]) / i for i in range(1, candidates + 1))
    return min(1.0, float(sum(law[right:]) + 2 * candidates * Fraction(delta) * share))


@pytest.mark.parametrize("case", [(1, 1, 1), (5, 5, 20), (18, 20, 25), (11, 20, 20), (30, 33, 90), (0, 4, 4)])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 2.0, 9.0])
@pytest.mark.parametrize("delta", [0.0, 1e-6, 1e-2])
def test_p_values_against_enumeration(case: tuple[int, int, int], epsilon: float, delta: float) -> None:
    found = bounds.one_run_p_value(*case, epsilon=epsilon, delta=delta)
    expected = p_value(*case, epsilon, delta)
    assert expected <= found <= expected * (1 + 1e-6)


def test_p_values_stay_exact_far_out() -> None:
    found = bounds.one_run_p_value(300, 300, 400, epsilon=0.1, delta=0.0)
    assert found == pytest.approx((math.exp(0.1) / (1 + math.exp(0.1))) ** 300, rel=1e-6)
    assert found < 1e-80
    assert bounds.one_run_p_value(200_000, 200_000, 200_000, epsilon=30.0, delta=1e-9) > 0.99
    assert bounds.one_run_epsilon(200_000, 200_000, 200_000, delta=0.0, confidence=0.95) == pytest.approx(
        math.log(1 / (0.05 ** (-1 / 200_000) - 1)), abs=1e-6
    )


def test_a_published_figure() -> None:
    assert bounds.one_run_epsilon(75, 100, 1000, delta=1e-4, confidence=0.95) == pytest.approx(0.673, abs=5e-4)


@pytest.mark.parametrize("delta", [0.0, 1e-2])
@pytest.mark.parametrize("epsilon", [0.3, 1.0, 3.0])
def test_of_randomised_responses_with_known_epsilon_the_bound_covers(epsilon: float, delta: float) -> None:
    """Each coin is told truthfully with probability delta + (1 - delta) q: (epsilon, delta)-private. Exact rates."""
    n, beta = 60, 0.1
    honest = delta + (1 - delta) / (1 + math.exp(-epsilon))
    lower = [bounds.one_run_epsilon(v, n, n, delta=delta, confidence=1 - beta) for v in range(n + 1)]
    law = [float(p) for p in binomial(n, honest)]

    def exceeding(claim: float) -> float:
        return sum(p for p, bound in zip(law, lower, strict=True) if bound > claim)

    assert exceeding(epsilon) <= beta
    if delta == 0:
        assert exceeding(epsilon) > beta / 20  # it is not idle
        assert exceeding(0.3 * epsilon - 0.2) > 3 * beta  # and a wrong scale is rejected


def test_one_that_tells_all_coins_with_probability_delta_is_covered() -> None:
    """(0, delta)-private: it tells everything or nothing. Without the correction for delta this would be refuted."""
    n, delta = 50, 0.2
    assert bounds.one_run_epsilon(n, n, n, delta=delta, confidence=1 - 0.19) == 0
    assert bounds.one_run_epsilon(n, n, n, delta=0.0, confidence=1 - 0.19) > 3


def test_what_is_out_of_range_is_refused() -> None:
    for call in (
        lambda: bounds.rate_at_most(11, 10, failure=0.1),
        lambda: bounds.rate_at_most(-1, 10, failure=0.1),
        lambda: bounds.rate_at_least(1, 10, failure=0.0),
        lambda: bounds.clopper_pearson(1, 10, confidence=1.0),
        lambda: bounds.epsilon_of_rates(1.1, 0.0, delta=0.0),
        lambda: bounds.epsilon_of_rates(0.1, 0.0, delta=1.0),
        lambda: bounds.mu_of_rates(math.nan, 0.0),
        lambda: bounds.epsilon_of_mu(-1.0, delta=0.1),
        lambda: bounds.mu_of_epsilon(math.inf, delta=0.1),
        lambda: bounds.one_run_p_value(3, 2, 5, epsilon=1.0, delta=0.0),
        lambda: bounds.one_run_p_value(2, 6, 5, epsilon=1.0, delta=0.0),
        lambda: bounds.one_run_p_value(2, 3, 5, epsilon=-1.0, delta=0.0),
        lambda: bounds.one_run_epsilon(2, 3, 5, delta=2.0, confidence=0.5),
    ):
        with pytest.raises(ParameterError):
            call()
