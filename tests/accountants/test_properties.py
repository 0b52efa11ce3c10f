"""What every accountant must satisfy whatever its method: monotone, symmetric, invertible, calm at the extremes."""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accountants
from accountants import (
    Composed,
    Gaussian,
    Interval,
    Laplace,
    ParameterError,
    PoissonSampled,
    PRVAccountant,
    RDPAccountant,
)
from accountants.components.sampled_noise import SampledNoise
from accountants.engines.one_step import delta_bounds

PLANS = {
    "noise_multiplier": st.floats(0.4, 20.0),
    "sample_rate": st.floats(1e-4, 1.0),
    "steps": st.integers(1, 20_000),
    "delta": st.floats(-10, -3).map(lambda exponent: 10.0**exponent),
}
MONOTONE = 1e-6  # relative; nodes and lattices differ between two plans
NARROW = 1e-4  # relative width
SAFER = {"noise_multiplier": 1.3, "sample_rate": 0.7, "steps": 0.7, "delta": 2.0}


def check_monotone(plan: dict, name: str, factor: float) -> None:
    safer = dict(plan)
    safer[name] = plan[name] * factor
    if name == "steps":
        safer[name] = int(safer[name])
    if name == "sample_rate":
        safer[name] = min(safer[name], 1.0)
    low, high = accountants.interval(**safer)
    risky_low, risky_high = accountants.interval(**plan)
    assert high <= risky_high * (1 + MONOTONE) + 1e-12  # whatever the widths
    # Rare, large losses have wide intervals, whose lower ends depend on where the lattice fell.
    narrow = risky_high - risky_low <= NARROW * risky_high
    assert low <= (risky_low if narrow else risky_high) * (1 + MONOTONE) + 1e-12
    assert accountants.epsilon(**safer, accountant="rdp") <= accountants.epsilon(**plan, accountant="rdp") * (1 + 1e-6)


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries(PLANS), st.sampled_from(sorted(SAFER)))
def test_a_safer_plan_never_spends_more(plan: dict, name: str) -> None:
    check_monotone(plan, name, SAFER[name])


@pytest.mark.parametrize("name", sorted(SAFER))
def test_a_plan_that_is_riskier_by_a_thousandth_would_be_noticed(name: str) -> None:
    plan = {"noise_multiplier": 1.0, "sample_rate": 0.01, "steps": 10_000, "delta": 1e-5}
    with pytest.raises(AssertionError):
        check_monotone(plan, name, 0.999 if SAFER[name] > 1 else 1.001)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "noise_multiplier": st.floats(-0.7, 2.0).map(lambda exponent: 10.0**exponent),
            "sample_rate": st.floats(-6, 0).map(lambda exponent: 10.0**exponent),
            "steps": st.integers(1, 100_000),
            "delta": st.floats(-14, -2.5).map(lambda exponent: 10.0**exponent),
        }
    ),
    st.sampled_from(sorted(SAFER)),
    st.floats(0.0, 1.0),
)
def test_a_safer_plan_never_spends_more_anywhere(plan: dict, name: str, share: float) -> None:
    check_monotone(plan, name, SAFER[name] ** share)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("rate", [1e-7, 1e-4, 0.03, 1.0])
def test_the_whole_range_is_answered_in_two_seconds(sigma: float, rate: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in (1, 3, 1000, 10**5, 10**7):
            for delta in (1e-3, 1e-9, 1e-15):
                start = time.process_time()
                low, high = accountants.interval(noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta)
                assert 0 <= low <= high < math.inf
                assert time.process_time() - start < 2


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries(PLANS))
def test_certified_epsilon_is_within_the_renyi_bound(plan: dict) -> None:
    low, high = accountants.interval(**plan)
    assert 0 <= low <= high <= accountants.epsilon(**plan, accountant="rdp") * (1 + 1e-12)
    if plan["steps"] * plan["sample_rate"] > 1:  # rarer, and one far loss dominates: wider, never unsound
        assert high - low <= 1e-3 * high


def test_epsilon_grows_with_every_step_of_a_run() -> None:
    curve = accountants.epsilon_curve(noise_multiplier=1.0, sample_rate=0.01, steps=range(0, 3000, 77), delta=1e-5)
    assert curve[0] == 0
    assert np.all(np.diff(curve) > 0)


def test_order_and_grouping_of_a_composition_do_not_matter() -> None:
    a, b, c = PoissonSampled(0.01, Gaussian(1.0)), PoissonSampled(0.02, Gaussian(2.0)), Laplace(20.0)
    one = PRVAccountant().compose(a, 50).compose(b, 30).compose(c).interval(1e-6)
    other = PRVAccountant().compose(c).compose(Composed([b * 10, a * 25, b * 20])).compose(a, 25).interval(1e-6)
    assert one == other


def test_counting_by_one_equals_counting_at_once() -> None:
    step = PoissonSampled(0.05, Gaussian(1.5))
    single = PRVAccountant()
    for _ in range(20):
        single.compose(step)
    assert single.interval(1e-5) == PRVAccountant().compose(step, 20).interval(1e-5)


@pytest.mark.parametrize("name", ["prv", "rdp", "gdp"])
def test_nothing_composed_spends_nothing(name: str) -> None:
    accountant = accountants.new_accountant(name)
    assert accountant.interval(1e-9) == Interval(0.0, 0.0)
    assert accountant.delta(0.0) == 0.0
    for plan in ({"steps": 0, "sample_rate": 0.5}, {"steps": 5, "sample_rate": 0.0}):
        assert accountants.epsilon(noise_multiplier=1.0, delta=1e-5, accountant=name, **plan) == 0.0


@pytest.mark.parametrize("name", ["prv", "rdp", "gdp"])
def test_no_noise_is_no_privacy(name: str) -> None:
    plan = {"noise_multiplier": 0.0, "sample_rate": 1.0, "steps": 1}
    assert accountants.epsilon(**plan, delta=1e-5, accountant=name) == math.inf
    assert accountants.delta(**plan, epsilon=5.0, accountant=name) == 1.0


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 3.0])
def test_delta_then_epsilon_comes_back(epsilon: float) -> None:
    accountant = PRVAccountant().compose(PoissonSampled(0.02, Gaussian(1.2)), 500)
    low, high = accountant.delta_interval(epsilon)
    assert 0 < low <= high <= low * 1.002
    assert accountant.interval(high).lower <= epsilon <= accountant.interval(low).upper * (1 + 1e-12) + 1e-12


def test_one_step_delta_is_the_larger_of_both_directions() -> None:
    component = SampledNoise("gaussian", 1.0, 0.3)
    levels = np.array([0.1, np.inf])
    ends = []
    for direction in ("remove", "add"):
        p, q = component.pair(direction).cells(levels)
        ends.append(float(p[0] - math.exp(0.1) * q[0]))
    assert ends[0] != pytest.approx(ends[1])
    assert delta_bounds(component, 0.1)[1] >= max(ends)


EXTREMES = [
    (0.05, 1e-7, 10**7, 1e-15),
    (0.05, 1.0, 10**7, 1e-15),
    (0.05, 0.5, 1, 1e-3),
    (0.06, 0.02, 20_000, 2e-15),
    (1e3, 1e-7, 1, 1e-15),
    (1e3, 0.999, 10**7, 1e-15),
    (1e3, 1e-7, 10**7, 1e-3),
    (1.0, 1e-7, 10**7, 1e-9),
    (0.3, 1e-5, 10**6, 1e-12),
    (400.0, 1e-6, 3, 1e-14),
]


@pytest.mark.parametrize("plan", EXTREMES, ids=str)
def test_extreme_plans_are_answered_without_warning(plan: tuple[float, float, int, float]) -> None:
    sigma, rate, steps, delta = plan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = accountants.interval(noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta)
        loose = RDPAccountant().compose(PoissonSampled(rate, Gaussian(sigma)), steps).epsilon(delta)
    assert 0 <= low <= high <= loose * (1 + 1e-12)
    assert math.isfinite(high)


@pytest.mark.parametrize(
    "change",
    [
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": math.nan},
        {"delta": "1e-5"},
        {"steps": 3.0},
        {"steps": True},
        {"steps": -1},
        {"sample_rate": 1.5},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"accountant": "moments"},
        {"relation": "substitute"},
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_by_name(change: dict) -> None:
    plan = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-5} | change
    with pytest.raises(ParameterError, match=next(iter(change))):
        accountants.epsilon(**plan)


def test_numpy_numbers_are_taken() -> None:
    plain = accountants.epsilon(noise_multiplier=2.0, sample_rate=0.5, steps=3, delta=1e-5)
    assert plain == accountants.epsilon(
        noise_multiplier=np.float64(2.0), sample_rate=np.float64(0.5), steps=np.int64(3), delta=np.float64(1e-5)
    )
