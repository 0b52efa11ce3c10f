"""Filters keep their budget whatever is asked, spend nearly all of it as planned, and forget nothing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accountants import Gaussian, Laplace, ParameterError, PoissonSampled, RDPAccountant, UnsupportedEventError
from accountants.adaptive.filters import PrivacyFilter, order_for_budget
from accountants.engines.gaussian import epsilon_bounds
from accountants.rdp_accountant import rdp
from accountants.zcdp_accountant import zcdp_epsilon

STEP = PoissonSampled(0.01, Gaussian(1.0))
REQUESTS = st.lists(
    st.tuples(
        st.sampled_from([0.5, 0.8, 1.0, 3.0, 20.0]), st.sampled_from([1e-3, 0.05, 0.5, 1.0]), st.integers(0, 200)
    ),
    max_size=30,
)


def converted(divergence: float, order: float, delta: float) -> float:
    """Epsilon by Proposition 12 of Canonne, Kamath and Steinke, as published."""
    return divergence + math.log((order - 1) / order) - (math.log(delta) + math.log(order)) / (order - 1)


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.floats(0.1, 10.0), st.sampled_from([1e-3, 1e-5, 1e-9]), st.sampled_from([None, 2.5, 40.0]))
def test_no_adaptive_sequence_passes_the_budget(
    requests: list[tuple[float, float, int]], epsilon: float, delta: float, order: float | None
) -> None:
    try:
        budget = PrivacyFilter(epsilon=epsilon, delta=delta, order=order)
    except ParameterError:
        assert order is not None  # an order that proves nothing, refused
        return
    assert budget.order is not None
    granted = 0.0
    for sigma, rate, count in requests:
        step = PoissonSampled(rate, Gaussian(sigma))
        if budget.spent > budget.budget / 2:  # whoever asks reacts to what was spent
            step = PoissonSampled(rate, Gaussian(2 * sigma))
        asked_before = budget.would_exceed(step, count)
        before = budget.spent
        if budget.request(step, count):
            granted += count * float(rdp(step, budget.order))
        else:
            assert budget.spent == before
            assert granted + count * float(rdp(step, budget.order)) > budget.budget * (1 - 1e-9)
        assert asked_before == (budget.spent == before and count > 0)
        assert granted <= budget.spent * (1 + 1e-12) + 1e-300
    assert budget.spent <= budget.budget
    assert converted(budget.spent, budget.order, delta) <= epsilon


@pytest.mark.parametrize(
    ("epsilon", "delta", "step"),
    [(1.4, 1e-5, STEP), (8.0, 1e-6, STEP), (0.3, 1e-9, PoissonSampled(1e-3, Gaussian(2.0)))],
    ids=["short", "long", "private"],
)
def test_the_planned_run_uses_nearly_all_and_the_next_step_is_refused(
    epsilon: float, delta: float, step: PoissonSampled
) -> None:
    def spent(count: int) -> float:
        return RDPAccountant().compose(step, count).epsilon(delta)

    longest = max(n for n in np.unique(np.geomspace(1, 30_000, 200).astype(int)) if spent(int(n)) <= epsilon)
    budget = PrivacyFilter(epsilon=epsilon, delta=delta, planned=longest * step)
    assert budget.request(step, math.floor(0.95 * longest))
    while budget.request(step):
        pass
    assert budget.granted >= 0.99 * longest
    assert spent(budget.granted) <= epsilon
    assert converted(float(rdp(step * (budget.granted + 1), budget.order)), budget.order, delta) > epsilon  # type: ignore[arg-type]
    assert budget.remaining < float(rdp(step, budget.order))  # type: ignore[arg-type]
    assert budget.request(PoissonSampled(0.01, Gaussian(30.0))) == (budget.remaining > 0)


def test_the_default_order_suits_gaussians() -> None:
    budget = PrivacyFilter(epsilon=2.0, delta=1e-6)
    assert budget.order == order_for_budget(2.0, 1e-6)
    whole = RDPAccountant()
    while budget.request(Gaussian(40.0)):
        whole.compose(Gaussian(40.0))
    assert 0.98 * 2.0 < whole.epsilon(1e-6) <= 2.0


def test_a_gaussian_filter_loses_nothing() -> None:
    budget = PrivacyFilter(epsilon=2.0, delta=1e-6, kind="gdp")
    total = 0.0
    for sigma in [10.0, 20.0, 15.0] * 100:
        total += sigma**-2 if budget.request(Gaussian(sigma)) else 0.0
    assert 1.98 < epsilon_bounds(math.sqrt(total), 1e-6)[0] <= 2.0
    assert budget.budget == pytest.approx(total, rel=0.02)
    with pytest.raises(UnsupportedEventError, match="rdp"):
        budget.request(STEP)


def test_a_concentrated_filter_adds_up_rho() -> None:
    budget = PrivacyFilter(epsilon=2.0, delta=1e-6, kind="zcdp")
    while budget.request(Gaussian(30.0)):
        pass
    assert 1.97 < zcdp_epsilon(budget.granted / 1800, 1e-6) <= 2.0
    assert zcdp_epsilon((budget.granted + 1) / 1800, 1e-6) > 2.0
    assert budget.request(Laplace(1e6))
    with pytest.raises(UnsupportedEventError):
        budget.request(STEP)


@pytest.mark.parametrize("kind", ["rdp", "gdp", "zcdp"])
def test_no_noise_is_refused_and_nothing_costs_nothing(kind: str) -> None:
    budget = PrivacyFilter(epsilon=100.0, delta=1e-5, kind=kind)
    assert not budget.request(Gaussian(0.0))
    assert budget.request(Gaussian(0.0), 0)
    assert budget.request(PoissonSampled(0.0, Gaussian(1.0)), 10**6)
    assert budget.spent == 0
    assert budget.remaining == budget.budget


@pytest.mark.parametrize("kind", ["rdp", "gdp", "zcdp"])
def test_a_larger_budget_allows_more(kind: str) -> None:
    def granted(epsilon: float, delta: float) -> int:
        budget = PrivacyFilter(epsilon=epsilon, delta=delta, kind=kind)
        while budget.request(Gaussian(25.0)):
            pass
        return budget.granted

    assert granted(0.5, 1e-5) < granted(1.0, 1e-5) < granted(1.0, 1e-3)


def test_state_comes_back_through_json_and_never_lowers_spending() -> None:
    budget = PrivacyFilter(epsilon=1.0, delta=1e-5, order=18.0)
    assert budget.request(PoissonSampled(0.01, Gaussian(3.0)), 10)
    state = json.loads(json.dumps(budget.state_dict()))
    fresh = PrivacyFilter(epsilon=1.0, delta=1e-5, order=18.0)
    fresh.load_state_dict(state)
    assert (fresh.spent, fresh.granted) == (budget.spent, budget.granted)
    assert fresh.request(PoissonSampled(0.01, Gaussian(3.0)))
    with pytest.raises(ParameterError, match="lower what was spent"):
        fresh.load_state_dict(state)
    with pytest.raises(ParameterError, match="lower what was spent"):
        fresh.load_state_dict(state | {"granted": 99})
    assert fresh.granted == 11


@pytest.mark.parametrize(
    "change",
    [{"spent": -1.0}, {"spent": 1e9}, {"spent": math.nan}, {"spent": "0"}, {"granted": -1}, {"order": 17.0},
     {"epsilon": 2.0}, {"delta": 1e-6}, {"kind": "gdp"}, {"relation": "zero_out"}, {"schema_version": 2},
     {"extra": 1}],
    ids=str,
)  # fmt: skip
def test_a_state_of_another_filter_is_refused(change: dict) -> None:
    budget = PrivacyFilter(epsilon=1.0, delta=1e-5, order=18.0)
    with pytest.raises(ParameterError):
        budget.load_state_dict(budget.state_dict() | change)
    incomplete = budget.state_dict()
    del incomplete["spent"]
    with pytest.raises(ParameterError, match="fields"):
        budget.load_state_dict(incomplete)


@pytest.mark.parametrize(
    "arguments",
    [{"epsilon": 0.0}, {"epsilon": math.inf}, {"delta": 0.0}, {"kind": "pld"}, {"order": 1.0}, {"order": 1.5},
     {"order": math.inf}, {"order": 9.0, "planned": STEP}, {"kind": "gdp", "order": 9.0}, {"relation": "swap"},
     {"planned": Gaussian(0.0)}, {"planned": 0 * STEP}],
    ids=str,
)  # fmt: skip
def test_a_budget_that_means_nothing_is_refused(arguments: dict) -> None:
    with pytest.raises(ParameterError):
        PrivacyFilter(**({"epsilon": 1.0, "delta": 1e-5} | arguments))
