"""Gaussian accounting: a bound without sampling, an estimate with it, and no way from one to the other by accident."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest

import accountants
from accountants import Gaussian, GDPAccountant, Laplace, ParameterError, PoissonSampled, UnsupportedEventError
from accountants.estimate import Estimate

STEP = PoissonSampled(1e-3, Gaussian(0.5))


def sampled() -> GDPAccountant:
    return GDPAccountant().compose(STEP, 10_000)


def test_the_limit_misses_the_truth_and_its_type_says_so() -> None:
    spent = sampled()
    epsilon = spent.epsilon(1e-5)
    assert type(epsilon) is Estimate
    assert float(epsilon) == pytest.approx(3.06, abs=0.005)
    assert accountants.interval(noise_multiplier=0.5, sample_rate=1e-3, steps=10_000, delta=1e-5).lower > 5.2
    assert type(spent.delta(3.0)) is Estimate
    assert type(spent.mu) is Estimate


def test_mu_of_the_limit_is_the_published_formula_and_squares_add() -> None:
    one = 1e-3 * math.sqrt(10_000 * (math.exp(4) - 1))
    two = 0.02 * math.sqrt(300 * (math.exp(1 / 2.25) - 1))
    assert float(sampled().mu) == pytest.approx(one, rel=1e-12)
    mixed = sampled().compose(PoissonSampled(0.02, Gaussian(1.5)), 300).compose(Gaussian(4.0), 3)
    assert float(mixed.mu) == pytest.approx(math.sqrt(one**2 + two**2 + 3 / 16), rel=1e-12)


def test_the_limit_is_near_the_truth_where_no_single_step_matters() -> None:
    plan = {"noise_multiplier": 20.0, "sample_rate": 0.05, "steps": 100_000, "delta": 1e-5}
    truth = accountants.interval(**plan)
    assert float(accountants.epsilon(**plan, accountant="gdp")) == pytest.approx(truth.upper, rel=0.01)


def test_one_sampled_step_among_exact_ones_makes_an_estimate() -> None:
    spent = GDPAccountant().compose(Gaussian(2.0), 5)
    assert type(spent.epsilon(1e-5)) is float
    assert type(spent.compose(STEP).epsilon(1e-5)) is Estimate


def test_an_interval_of_an_estimate_is_refused() -> None:
    for question in (sampled().interval, sampled().delta_interval):
        with pytest.raises(UnsupportedEventError, match="PRVAccountant"):
            question(0.5)


def test_other_noise_is_refused_and_not_added() -> None:
    spent = sampled()
    with pytest.raises(UnsupportedEventError, match="PRVAccountant"):
        spent.compose(Laplace(1.0))
    assert spent.event == sampled().event


def test_bad_arguments_are_refused_for_estimates_too() -> None:
    with pytest.raises(ParameterError, match="delta"):
        sampled().epsilon(0.0)
    with pytest.raises(ParameterError, match="epsilon"):
        sampled().delta(-1.0)


def test_hardly_any_noise_is_infinite_without_an_error() -> None:
    spent = GDPAccountant().compose(PoissonSampled(0.5, Gaussian(0.01)))
    assert math.isinf(spent.epsilon(1e-5))
    assert float(spent.delta(1.0)) == 1.0


@pytest.mark.parametrize(
    "result",
    [
        Estimate(2.0) + 1,
        1 + Estimate(2.0),
        Estimate(4.0) - 1.0,
        7.0 - Estimate(4.0),
        1.5 * Estimate(2.0),
        Estimate(9.0) / 3,
        6.0 / Estimate(2.0),
        -Estimate(-3.0),
        abs(Estimate(-3.0)),
        round(Estimate(3.04), 1),
        3 ** Estimate(1.0),
        max(Estimate(3.0), 1.0),
        np.float64(1.5) * Estimate(2.0),
        sum([Estimate(1.0), 2.0]),
    ],
)
def test_arithmetic_keeps_the_type(result: object) -> None:
    assert type(result) is Estimate
    assert float(result) == 3.0


def test_numpy_functions_refuse_rather_than_forget() -> None:
    with pytest.raises(TypeError):
        np.exp(Estimate(1.0))


def test_it_prints_as_what_it_is() -> None:
    estimate = Estimate(3.06)
    assert (repr(estimate), str(estimate)) == ("Estimate(3.06)", "~3.06 (an estimate, not a bound)")
    assert f"{estimate}" == str(estimate)
    assert f"{estimate:.1f}" == "~3.1"
    assert type(float(estimate)) is float


def test_copies_keep_the_type() -> None:
    assert repr(pickle.loads(pickle.dumps(Estimate(3.5)))) == repr(copy.deepcopy(Estimate(3.5))) == "Estimate(3.5)"
