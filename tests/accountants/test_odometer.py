"""The odometer's readings hold at all times at once against an analyst who plays against them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accountants import Gaussian, Laplace, ParameterError, PoissonSampled, RDPAccountant
from accountants.adaptive.odometer import PrivacyOdometer, time_uniform_epsilon
from accountants.engines.gaussian import epsilon_bounds

STEP = PoissonSampled(0.02, Gaussian(1.2))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.3, 30.0), st.sampled_from([1e-3, 0.1, 1.0]), st.integers(0, 50)), max_size=10),
    st.sampled_from([1e-3, 1e-6]),
)
def test_readings_never_fall_and_bound_the_same_run_fixed_in_advance(
    steps: list[tuple[float, float, int]], delta: float
) -> None:
    odometer, accountant, last = PrivacyOdometer(delta=delta), RDPAccountant(), 0.0
    for sigma, rate, count in steps:
        event = PoissonSampled(rate, Gaussian(sigma))
        reading = odometer.compose(event, count).epsilon()
        assert reading >= last
        assert reading >= accountant.compose(event, count).epsilon(delta) * (1 - 1e-9)
        last = reading


@pytest.mark.parametrize("steps", [1, 30, 1000])
def test_never_below_the_tight_epsilon(steps: int) -> None:
    for mu in (0.01, 0.1):
        reading = PrivacyOdometer(delta=1e-6).compose(Gaussian(1 / mu), steps).epsilon()
        assert reading >= epsilon_bounds(mu * math.sqrt(steps), 1e-6)[1]


def test_the_price_of_adaptivity_is_small() -> None:
    for steps, factor in [(300, 1.75), (3000, 1.4), (30_000, 1.2)]:
        fixed = RDPAccountant().compose(STEP, steps).epsilon(1e-6)
        assert PrivacyOdometer(delta=1e-6).compose(STEP, steps).epsilon() <= factor * fixed


def by_shares(spent: np.ndarray, orders: np.ndarray, delta: float) -> np.ndarray:
    """The bound that splits delta among the orders, each by itself."""
    return np.min(spent + np.log(len(orders) / delta) / (orders - 1), axis=-1)


def test_the_reading_solves_its_equation_and_beats_splitting_delta() -> None:
    rng = np.random.default_rng(3)
    orders = 1 + np.geomspace(0.1, 300.0, 20)
    spent = np.sort(10 ** rng.uniform(-4, 3, (200, 20)), axis=1)
    reading = time_uniform_epsilon(spent, orders.tolist(), 1e-5)
    exponents = (orders - 1) * (reading[:, None] - spent)
    weighed = np.logaddexp.reduce(exponents, axis=1) - math.log(20) - math.log(1e5)
    assert np.all(weighed >= 0)
    assert np.all(weighed <= 1e-6)
    assert np.all(reading <= by_shares(spent, orders, 1e-5) * (1 + 1e-11))
    one = time_uniform_epsilon(spent[:, :1], [orders[0]], 1e-5)
    assert one == pytest.approx(by_shares(spent[:, :1], orders[:1], 1e-5))


SIGMAS = np.array([0.7, 1.0, 1.5, 2.5, 4.0, 8.0, 16.0])
RUNS, STEPS, DELTA = 3000, 140, 0.05
ORDERS = (1 + np.geomspace(0.25, 64.0, 12)).tolist()


def broken_readings(scale: float) -> int:
    """Runs in which an adversary, who wants the loss above `scale` times the reading, gets it there at some time.

    The loss of a Gaussian step of noise multiplier s is N(1 / (2 s^2), 1 / s^2). The adversary begins with much noise
    and takes less and less, the faster the further the loss is from the reading; it stops when it has won.
    """
    costs = np.array([PrivacyOdometer(delta=DELTA, orders=ORDERS).compose(Gaussian(s)).spent for s in SIGMAS])
    rng = np.random.default_rng(11)
    spent, loss = np.zeros((RUNS, len(ORDERS))), np.zeros(RUNS)
    reading, won = np.zeros(RUNS), 0
    for step in range(STEPS):
        slowness = np.clip(len(SIGMAS) - 1 - step // 20 - (loss < 0.3 * reading), 0, None)
        s = SIGMAS[slowness]
        spent += costs[slowness]
        loss += rng.normal(1 / (2 * s**2), 1 / s)
        reading = time_uniform_epsilon(spent, ORDERS, DELTA)
        over = loss > scale * reading
        won += int(over.sum())
        spent, loss, reading = spent[~over], loss[~over], reading[~over]
    return won


def test_an_adversary_who_stops_at_the_worst_time_breaks_at_most_delta_of_the_runs() -> None:
    limit = DELTA * RUNS + 4 * math.sqrt(DELTA * RUNS)
    won = broken_readings(1.0)
    assert won <= limit
    assert won > 0.2 * DELTA * RUNS  # the attack is in earnest
    assert broken_readings(0.85) > limit
    assert broken_readings(0.7) > 2 * limit


def test_nothing_is_zero_and_no_noise_is_infinite() -> None:
    odometer = PrivacyOdometer(delta=1e-5)
    assert odometer.epsilon() == 0
    assert odometer.compose(PoissonSampled(0.0, Gaussian(1.0)), 5).compose(Gaussian(0.0), 0).epsilon() == 0
    assert odometer.compose(Gaussian(0.0)).epsilon() == math.inf
    assert odometer.compose(STEP).epsilon() == math.inf


def test_a_bounded_loss_is_not_exceeded_by_much() -> None:
    # Laplace noise of scale 10 has loss at most 0.1; the reading's excess is the price of following it.
    assert 0.1 <= PrivacyOdometer(delta=1e-3).compose(Laplace(10.0)).epsilon() <= 0.15


def test_state_comes_back_through_json_and_never_lowers_spending() -> None:
    odometer = PrivacyOdometer(delta=1e-5, orders=[8, 2.5, 64]).compose(STEP, 100)
    assert odometer.orders == (2.5, 8.0, 64.0)
    state = json.loads(json.dumps(odometer.state_dict()))
    fresh = PrivacyOdometer(delta=1e-5, orders=[2.5, 8, 64])
    fresh.load_state_dict(state)
    assert fresh.epsilon() == odometer.epsilon()
    fresh.compose(STEP)
    with pytest.raises(ParameterError, match="lower what was spent"):
        fresh.load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [{"spent": [1.0]}, {"spent": 3}, {"spent": [math.nan] * 3}, {"orders": [2.0, 8.0, 63.0]}, {"delta": 1e-4},
     {"relation": "zero_out"}, {"schema_version": 9}, {"more": 1}],
    ids=str,
)  # fmt: skip
def test_a_state_of_another_odometer_is_refused(change: dict) -> None:
    odometer = PrivacyOdometer(delta=1e-5, orders=[2, 8, 64])
    with pytest.raises(ParameterError):
        odometer.load_state_dict(odometer.state_dict() | change)


@pytest.mark.parametrize("change", [{"delta": 0.0}, {"orders": []}, {"orders": [1.0]}, {"orders": [2, 2]},
                                    {"orders": [math.inf]}, {"relation": "swap"}], ids=str)  # fmt: skip
def test_bad_arguments_are_refused(change: dict) -> None:
    with pytest.raises(ParameterError):
        PrivacyOdometer(**({"delta": 1e-5} | change))
