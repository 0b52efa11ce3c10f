"""Individual accounts against one accountant an example: never below, close above; the filter keeps each budget."""

from __future__ import annotations

import math

import numpy as np
import pytest

from accountants import Gaussian, ParameterError, PoissonSampled, RDPAccountant, UnsupportedEventError
from accountants.adaptive.individual import IndividualAccountant
from accountants.adaptive.odometer import PrivacyOdometer
from accountants.rdp_accountant import rdp

PLAN = {"noise_multiplier": 1.0, "sample_rate": 0.02}
STEP = {"max_grad_norm": 2.0} | PLAN


def one_by_one(norms: np.ndarray, clip: float, steps: int, delta: float, q: float, sigma: float) -> np.ndarray:
    """Epsilon of each example by an accountant of its own, at a continuous order; norms [N] or [steps, N]."""
    rows = np.broadcast_to(norms, (steps, norms.shape[-1])) if norms.ndim == 1 else norms
    found = []
    for own in rows.T:
        accountant = RDPAccountant()
        for norm in own:
            if norm > 0:
                accountant.compose(PoissonSampled(q, Gaussian(sigma * clip / min(norm, clip))))
        found.append(accountant.epsilon(delta))
    return np.array(found)


def test_all_at_the_clip_norm_is_the_common_account() -> None:
    accountant = IndividualAccountant(size=4)
    for _ in range(500):
        accountant.step([2.0, 7.0, math.inf, math.nan], **STEP)
    common = RDPAccountant().compose(PoissonSampled(0.02, Gaussian(1.0)), 500).epsilon(1e-5)
    assert np.ptp(accountant.epsilon(1e-5)) == 0
    assert common * (1 - 1e-9) <= accountant.epsilon(1e-5)[0] <= 1.01 * common


def test_norm_zero_costs_nothing() -> None:
    accountant = IndividualAccountant(size=2).step([0.0, 1e-9], **STEP)
    assert accountant.epsilon(1e-5)[0] == 0 < accountant.epsilon(1e-5)[1]
    assert accountant.odometer_epsilon(1e-5)[0] == 0 < accountant.odometer_epsilon(1e-5)[1]
    assert np.all(accountant.spent[0] == 0)


@pytest.mark.parametrize(
    ("q", "sigma", "steps"), [(0.02, 1.0, 600), (1.0, 10.0, 50), (0.05, 2.0, 1000), (0.004, 0.6, 3000)]
)
def test_never_below_an_account_of_its_own_and_within_five_percent(q: float, sigma: float, steps: int) -> None:
    clip = 3.0
    norms = np.random.default_rng(0).uniform(0.05, 1.2, 12) * clip
    accountant = IndividualAccountant(size=12)
    for _ in range(steps):
        accountant.step(norms, max_grad_norm=clip, noise_multiplier=sigma, sample_rate=q)
    # Equal steps: the oracle composes them at once.
    exact = [
        RDPAccountant().compose(PoissonSampled(q, Gaussian(sigma * clip / min(norm, clip))), steps).epsilon(1e-5)
        for norm in norms
    ]
    ours = accountant.epsilon(1e-5)
    assert np.all(ours >= np.array(exact) * (1 - 1e-9))
    assert np.all(ours <= np.array(exact) * 1.05)


def test_norms_that_change_from_step_to_step() -> None:
    norms = np.random.default_rng(1).lognormal(-1.0, 0.8, (40, 6)) * 2.0
    accountant = IndividualAccountant(size=6)
    for row in norms:
        accountant.step(row, max_grad_norm=2.0, noise_multiplier=2.0, sample_rate=0.3)
    exact = one_by_one(norms, 2.0, 40, 1e-5, 0.3, 2.0)
    assert np.all(accountant.epsilon(1e-5) >= exact * (1 - 1e-9))
    assert np.all(accountant.epsilon(1e-5) <= exact * 1.05)
    assert accountant.epsilon(1e-5, indices=[4, 0]).tolist() == accountant.epsilon(1e-5)[[4, 0]].tolist()


def test_fewer_levels_charge_more_never_less() -> None:
    norms = np.random.default_rng(2).random(50)
    # Ten fine levels to each coarse one, so that the coarse are among the fine, up to a rounding.
    fine, coarse = (IndividualAccountant(size=50, levels=n).step(norms, **STEP).spent for n in (191, 20))
    assert np.all(coarse >= fine * (1 - 1e-12))
    assert np.any(coarse > 1.05 * fine)


def test_those_without_a_known_norm_are_charged_the_clip_norm() -> None:
    some = IndividualAccountant(size=5).step([0.1, 0.2], indices=[3, 1], **STEP)
    everybody = IndividualAccountant(size=5).step([2.0, 0.2, 2.0, 0.1, 2.0], **STEP)
    assert np.array_equal(some.spent, everybody.spent)
    nobody = IndividualAccountant(size=5).step([], indices=[], **STEP)
    assert np.array_equal(nobody.spent, IndividualAccountant(size=5).step([2.0] * 5, **STEP).spent)


def test_divergences_are_those_of_the_scaled_noise_and_add_up() -> None:
    orders = [1.5, 4.0, 32.0]
    accountant = IndividualAccountant(size=1, orders=orders, levels=1)
    for _ in range(1000):
        accountant.step([0.7], **STEP)  # one level: rounded up to the clip norm
    exact = 1000 * rdp(PoissonSampled(0.02, Gaussian(1.0)), orders)
    assert np.all(accountant.spent[0] >= exact)
    assert accountant.spent[0] == pytest.approx(exact, rel=1e-11)


def test_the_running_bound_is_the_odometer_s() -> None:
    accountant = IndividualAccountant(size=2)
    odometer = PrivacyOdometer(delta=1e-5).compose(PoissonSampled(0.02, Gaussian(1.0)), 200)
    for _ in range(200):
        accountant.step([2.0, 0.4], **STEP)
    own = accountant.odometer_epsilon(1e-5)
    assert own[0] == pytest.approx(odometer.epsilon(), rel=1e-9)
    assert own[1] < own[0]
    assert np.all(own > accountant.epsilon(1e-5))


def test_the_filter_keeps_every_budget_and_lets_the_quiet_stay() -> None:
    rng = np.random.default_rng(5)
    size, budget = 40, (1.5, 1e-5)
    scale = np.geomspace(0.02, 3.0, size)
    order = 9.0  # about the best for PLAN; an order of the accountant
    accountant, taken = IndividualAccountant(size=size, orders=[4.0, order, 30.0]), np.zeros(size, dtype=int)
    charged: list[list[float]] = [[] for _ in range(size)]
    for _ in range(400):
        norms = scale * rng.lognormal(0.0, 0.3, size)
        allowed = accountant.active(*budget, order=order, norms=norms, max_grad_norm=2.0, **PLAN)
        accountant.step(np.where(allowed, norms, 0.0), **STEP)
        taken += allowed
        for n in np.flatnonzero(allowed):
            charged[n].append(float(norms[n]))
    assert np.all(accountant.epsilon(1e-5) <= 1.5)
    assert taken[0] == 400
    assert taken[-1] < 200
    loudest = RDPAccountant()
    for norm in charged[-1]:
        loudest.compose(PoissonSampled(0.02, Gaussian(2.0 / min(norm, 2.0))))
    assert 1.2 < loudest.epsilon(1e-5) <= 1.5


def test_the_filter_refuses_exactly_the_step_that_would_pass_the_budget() -> None:
    accountant = IndividualAccountant(size=1)
    while accountant.active(2.0, 1e-6, **PLAN)[0]:
        accountant.step([2.0], **STEP)
    spent = accountant.spent[0]
    one = IndividualAccountant(size=1).step([2.0], **STEP).spent[0]
    # The conversion as published, at each order: where the filter stands, a step more is too much, and it was not yet.
    a = np.array(accountant.orders)
    extra = np.log((a - 1) / a) - (math.log(1e-6) + np.log(a)) / (a - 1)
    assert np.any((spent + extra <= 2.0) & (spent + one + extra > 2.0))
    assert accountant.epsilon(1e-6)[0] <= 2.0
    assert accountant.active(2.0, 1e-6, norms=[0.0], **PLAN)[0]


def test_the_filter_s_budget_is_fixed_at_the_first_call() -> None:
    accountant = IndividualAccountant(size=1)
    accountant.active(2.0, 1e-6, **PLAN)
    with pytest.raises(ParameterError, match="same at every call"):
        accountant.active(3.0, 1e-6, **PLAN)
    with pytest.raises(ParameterError, match="same at every call"):
        accountant.active(2.0, 1e-6, order=accountant.orders[40], **PLAN)
    with pytest.raises(ParameterError, match="one of"):
        IndividualAccountant(size=1).active(2.0, 1e-6, order=3.0, **PLAN)
    with pytest.raises(ParameterError, match="orders"):
        IndividualAccountant(size=1, orders=[1.5]).active(0.5, 1e-9, **PLAN)


@pytest.mark.parametrize(
    ("norms", "change"),
    [([1.0], {}), ([1.0, -1.0], {}), ([1.0], {"indices": [2]}), ([1.0, 1.0], {"indices": [0, 0]}),
     ([1.0], {"indices": [0.5]}), ([1.0], {"indices": [-1]}), ([1.0, 1.0], {"max_grad_norm": 0.0}),
     ([1.0, 1.0], {"sample_rate": 2.0}), ([1.0, 1.0], {"noise_multiplier": -1.0})],
    ids=str,
)  # fmt: skip
def test_a_step_that_does_not_fit_is_refused_and_not_charged(norms: list[float], change: dict) -> None:
    accountant = IndividualAccountant(size=2)
    with pytest.raises(ParameterError):
        accountant.step(norms, **(STEP | change))
    assert np.all(accountant.spent == 0)


def test_bad_accountants_are_refused() -> None:
    with pytest.raises(UnsupportedEventError, match="replace_one"):
        IndividualAccountant(size=2, relation="replace_one")
    for change in ({"size": 0}, {"size": 2, "levels": 0}, {"size": 2, "orders": [1.0]}):
        with pytest.raises(ParameterError):
            IndividualAccountant(**change)  # type: ignore[arg-type]
