"""Guarantees taken as given: their worst pairs, compositions, groups and sampling against the published formulas."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest

from accountants.components.component import DIRECTIONS, Component
from accountants.components.sampled_noise import SampledNoise
from accountants.components.selected import Selected
from accountants.engines import one_step
from accountants.errors import ParameterError, UnsupportedEventError
from accountants.events import Event, Gaussian
from accountants.events.black_box import ZCDP, EpsilonDelta
from accountants.events.tuning import RepeatAndSelect
from accountants.prv_accountant import PRVAccountant
from accountants.reduction.additive import Neighbours
from accountants.reduction.discrete_reduction import DiscreteEvent, component_of
from accountants.reduction.normal_form import NormalForm
from accountants.relation import NeighboringRelation
from accountants.tuning import Repetitions

ADDED = Neighbours(NeighboringRelation.ADD_OR_REMOVE)
T = np.array([1e-3, 0.4, 1.0, 6.0])


def found(event: DiscreteEvent, neighbours: Neighbours = ADDED, rate: float = 1.0) -> Component:
    component = component_of(event, neighbours, rate)
    assert component is not None
    return component


def composed_delta(epsilon: float, delta: float, steps: int, at: float) -> float:
    """Kairouz, Oh, Viswanath 2015, Theorem 3.3: the exact curve of `steps` worst mechanisms."""
    total = 0.0
    for ups in range(steps + 1):
        p = math.comb(steps, ups) * math.exp(ups * epsilon) / (1 + math.exp(epsilon)) ** steps
        q = math.comb(steps, ups) * math.exp((steps - ups) * epsilon) / (1 + math.exp(epsilon)) ** steps
        total += max(p - math.exp(at) * q, 0.0)
    return 1 - (1 - delta) ** steps * (1 - total)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (1.0, 1e-3), (3.0, 0.2), (0.0, 0.1)])
@pytest.mark.parametrize("relation", list(NeighboringRelation))
def test_one_use_has_its_guarantee_and_the_curve_below_it(
    epsilon: float, delta: float, relation: NeighboringRelation
) -> None:
    component = found(EpsilonDelta(epsilon, delta), Neighbours(relation))
    for at in (0.0, 0.3 * epsilon, epsilon, epsilon + 1):
        low, high = one_step.delta_bounds(component, at)
        exact = composed_delta(epsilon, delta, 1, at)
        assert low <= exact + 1e-15
        assert high == pytest.approx(exact, rel=1e-11, abs=2e-14)
        if at < epsilon:
            assert low == pytest.approx(exact, rel=1e-11)


@pytest.mark.parametrize(("epsilon", "delta", "steps"), [(0.3, 0.0, 30), (0.1, 1e-9, 200), (1.0, 1e-4, 5)])
def test_composition_holds_the_optimal_one(epsilon: float, delta: float, steps: int) -> None:
    form = NormalForm(((found(EpsilonDelta(epsilon, delta)), steps),))
    for at in (0.5, 2.0):
        exact = composed_delta(epsilon, delta, steps, at)
        interval = PRVAccountant()._delta_interval(form, at)
        assert interval.lower * (1 - 1e-9) <= exact <= interval.upper * (1 + 1e-9)
        assert interval.upper <= exact * 1.002


def test_likely_disclosure_is_counted_in_full() -> None:
    form = NormalForm(((found(EpsilonDelta(0.5, 0.7)), 3),))
    interval = PRVAccountant()._delta_interval(form, 1.0)
    exact = composed_delta(0.5, 0.7, 3, 1.0)
    assert interval.lower <= exact <= interval.upper <= exact * (1 + 1e-3)


def test_disclosure_alone_composes() -> None:
    """All finite losses are 0: the lattice has no scale of its own."""
    form = NormalForm(((found(EpsilonDelta(0.0, 1e-3)), 3),))
    interval = PRVAccountant()._delta_interval(form, 0.2)
    assert interval.lower <= composed_delta(0.0, 1e-3, 3, 0.2) <= interval.upper


def test_a_delta_below_the_disclosure_has_no_epsilon() -> None:
    form = NormalForm(((found(EpsilonDelta(0.5, 1e-3)), 3),))
    assert PRVAccountant()._epsilon_interval(form, 1e-4).upper == math.inf


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (1.0, 1e-3)])
@pytest.mark.parametrize("size", [2, 5])
def test_a_group_has_the_guarantee_that_chaining_gives(epsilon: float, delta: float, size: int) -> None:
    group = Neighbours(NeighboringRelation.REPLACE_ONE, size)
    component = found(EpsilonDelta(epsilon, delta), group)
    expected = delta * sum(math.exp(i * epsilon) for i in range(size))
    upper = one_step.delta_bounds(component, size * epsilon)[1]
    assert expected <= upper <= expected * (1 + 1e-9) + 1e-12
    assert one_step.delta_bounds(component, size * epsilon * 0.9)[1] > upper
    assert component.witness("remove") is None  # not known to be attained


def test_a_group_whose_delta_reaches_one_is_not_private() -> None:
    assert component_of(EpsilonDelta(2.0, 0.1), Neighbours(NeighboringRelation.ZERO_OUT, 4)) is None
    assert component_of(EpsilonDelta(1e6, 1e-300), Neighbours(NeighboringRelation.ZERO_OUT, 2)) is None


@pytest.mark.parametrize(("epsilon", "delta", "rate"), [(1.0, 0.0, 0.1), (2.0, 1e-4, 0.01), (0.5, 1.0, 0.2)])
def test_sampling_amplifies_as_published(epsilon: float, delta: float, rate: float) -> None:
    """Balle, Barthe, Gaboardi 2018, Theorem 8: (log(1 + q (e^epsilon - 1)), q delta)."""
    component = found(EpsilonDelta(epsilon, delta), ADDED, rate)
    at = math.log1p(rate * math.expm1(epsilon))
    if delta < 1:
        assert one_step.delta_bounds(component, at)[1] == pytest.approx(rate * delta, rel=1e-10, abs=1e-13)
        assert one_step.delta_bounds(component, 0.9 * at)[0] > rate * delta + 1e-6
    else:
        assert one_step.delta_bounds(component, 5.0)[1] == pytest.approx(rate, rel=1e-12)


def test_moments_of_a_sampled_guarantee_equal_mpmath() -> None:
    """Adding: the unit's absence against its possible presence, which has outcomes of its own."""
    epsilon, delta, rate = 0.4, 0.02, 0.1
    bounds = found(EpsilonDelta(epsilon, delta), ADDED, rate).log_moments("add", T)
    assert np.all(found(EpsilonDelta(epsilon, delta), ADDED, rate).log_moments("remove", T) == math.inf)
    with mpmath.workdps(40):
        likely = (1 - mpmath.mpf(delta)) / (1 + mpmath.exp(-mpmath.mpf(epsilon)))
        unlikely = 1 - mpmath.mpf(delta) - likely
        absent = [likely, unlikely, mpmath.mpf(delta)]
        present = [unlikely, likely, mpmath.mpf(0)]
        for t, bound in zip(T, bounds, strict=True):
            mixed = [(1 - mpmath.mpf(rate)) * a + mpmath.mpf(rate) * b for a, b in zip(absent, present, strict=True)]
            pairs = zip(absent, mixed, strict=True)
            exact = mpmath.log(mpmath.fsum(a * (a / b) ** mpmath.mpf(t) for a, b in pairs))
            assert exact <= bound <= exact * (1 + 1e-9)


def test_sampling_without_a_proof_is_refused() -> None:
    for neighbours in (Neighbours(NeighboringRelation.REPLACE_ONE), Neighbours(NeighboringRelation.ADD_OR_REMOVE, 2)):
        with pytest.raises(UnsupportedEventError, match="Poisson sampling"):
            component_of(EpsilonDelta(1.0), neighbours, 0.5)
    with pytest.raises(UnsupportedEventError, match="Poisson sampling"):
        component_of(ZCDP(1.0), ADDED, 0.5)


def test_huge_epsilon_stays_finite_and_silent() -> None:
    component = found(EpsilonDelta(1e6))
    assert one_step.epsilon_bounds(component, 1e-6)[1] == pytest.approx(1e6, rel=1e-6)
    for direction in DIRECTIONS:
        assert component.log_moments(direction, T) == pytest.approx(1e6 * T, rel=1e-5)


def test_concentrated_moments_are_its_definition() -> None:
    for direction in DIRECTIONS:
        moments = found(ZCDP(0.3, 0.1)).log_moments(direction, T)
        assert np.all(moments >= T * (0.1 + 0.3 * (1 + T)))
        assert moments == pytest.approx(T * (0.1 + 0.3 * (1 + T)), rel=1e-12)


def test_concentrated_noise_of_gaussian_parameters_is_gaussian() -> None:
    """rho = 1 / (2 s^2), alone and in a group of three, by moments and by Renyi epsilon."""
    for size in (1, 3):
        concentrated = found(ZCDP(1 / 32), Neighbours(NeighboringRelation.ZERO_OUT, size))
        gaussian = SampledNoise("gaussian", 4.0 / size, 1.0)
        assert concentrated.log_moments("add", T) == pytest.approx(gaussian.log_moments("add", T), rel=1e-9)
    form = NormalForm(((found(ZCDP(1 / 32)), 7),))
    interval = PRVAccountant()._epsilon_interval(form, 1e-6)
    assert interval.lower == 0
    # The least over orders of order 1 + t, by a grid.
    t = np.geomspace(1e-2, 1e3, 100_001)
    bound = 7 / 32 * (1 + t) - (math.log(1e-6) + np.log1p(t)) / t - np.log1p(1 / t)
    assert interval.upper == pytest.approx(bound.min(), rel=1e-4)


def test_groups_of_approximately_concentrated_mechanisms_are_refused() -> None:
    with pytest.raises(UnsupportedEventError, match="groups"):
        component_of(ZCDP(1.0, 0.5), Neighbours(NeighboringRelation.ADD_OR_REMOVE, 2))


def test_nothing_spent_stays_nothing() -> None:
    for event in (EpsilonDelta(0.0), ZCDP(0.0)):
        assert one_step.epsilon_bounds(found(event), 1e-9) == (0.0, 0.0)
    assert component_of(EpsilonDelta(1.0, 1.0), ADDED) is None


@pytest.mark.parametrize("shape", [0.0, 1.0, math.inf])
def test_selection_has_the_curve_of_its_repetitions(shape: float) -> None:
    """Two kinds of component inside; the curve is their sum's, put through the published transformation."""
    inner = [(SampledNoise("gaussian", 2.0, 1.0), 3), (SampledNoise("laplace", 5.0, 1.0), 2)]
    repetitions = Repetitions(mean=12.0, shape=shape)
    component = Selected.of(inner, repetitions)
    assert component is not None

    def one_run(orders: np.ndarray) -> np.ndarray:
        b = 5.0
        moment = (orders * np.exp((orders - 1) / b) + (orders - 1) * np.exp(-orders / b)) / (2 * orders - 1)
        return 3 * orders / 8 + 2 * np.log(moment) / (orders - 1)

    for direction in DIRECTIONS:
        expected = T * repetitions.rdp(one_run, 1 + T)
        assert component.log_moments(direction, T) == pytest.approx(expected, rel=1e-6)
        assert component.pair(direction) is None


def test_selection_takes_the_larger_direction_of_one_run() -> None:
    inner = SampledNoise("gaussian", 0.8, 0.2)
    component = Selected.of([(inner, 1)], Repetitions(mean=1.0, shape=0.0))
    assert component is not None
    larger = np.maximum(*(inner.log_moments(direction, T) for direction in DIRECTIONS))
    smaller = np.minimum(*(inner.log_moments(direction, T) for direction in DIRECTIONS))
    assert np.all(smaller[1:] < 0.99 * larger[1:])
    for direction in DIRECTIONS:
        assert component.log_moments(direction, T) == pytest.approx(larger, rel=1e-6)


def test_selection_among_runs_without_noise_is_not_private() -> None:
    repetitions = Repetitions(mean=3.0, shape=1.0)
    assert Selected.of([(SampledNoise("gaussian", 1.0, 1.0), 1), (None, 2)], repetitions) is None
    assert Selected.of([(None, 0)], repetitions) == Selected((), repetitions)


@pytest.mark.parametrize(
    "event",
    [
        EpsilonDelta(0.5, 1e-6),
        ZCDP(0.5, 0.25),
        RepeatAndSelect(Gaussian(1.0), 10, 1.0),
        RepeatAndSelect(100 * Gaussian(9.0), 10.5, math.inf),
    ],
    ids=str,
)
def test_events_survive_json(event: Event) -> None:
    assert Event.from_json(event.to_json()) == event


@pytest.mark.parametrize(
    "make",
    [
        lambda: EpsilonDelta(-0.1),
        lambda: EpsilonDelta(math.inf),
        lambda: EpsilonDelta(1.0, 1.5),
        lambda: ZCDP(-1.0),
        lambda: ZCDP(1.0, math.inf),
        lambda: RepeatAndSelect(Gaussian(1.0), 0.5, 1.0),
        lambda: RepeatAndSelect(Gaussian(1.0), 5.0, -1.0),
        lambda: RepeatAndSelect(1.0, 5.0, 1.0),  # type: ignore[arg-type]
    ],
)
def test_parameters_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(ParameterError):
        make()  # type: ignore[operator]
