"""Discrete Gaussian, Skellam and randomized response: pairs by enumeration, relations, groups, sampling, refusals."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest

from accountants.components.component import DIRECTIONS, Component
from accountants.components.finite import FiniteOutcomes, Outcome
from accountants.engines import one_step
from accountants.engines.lattice import dominated, dominating
from accountants.errors import ParameterError, UnsupportedEventError
from accountants.events import Event
from accountants.events.noise import DiscreteGaussian, RandomizedResponse, Skellam, SkellamVector
from accountants.prv_accountant import PRVAccountant
from accountants.reduction.additive import Neighbours
from accountants.reduction.discrete_reduction import DiscreteEvent, component_of, location_of
from accountants.reduction.normal_form import NormalForm
from accountants.relation import NeighboringRelation
from tests.accountants.test_lattice import curve, truth

ADDED = Neighbours(NeighboringRelation.ADD_OR_REMOVE)
REPLACED = Neighbours(NeighboringRelation.REPLACE_ONE)
ZEROED = Neighbours(NeighboringRelation.ZERO_OUT)


def found(event: DiscreteEvent, neighbours: Neighbours, rate: float = 1.0) -> Component:
    component = component_of(event, neighbours, rate)
    assert component is not None
    return component


def divergence(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    """Of two laws on the same outcomes, the larger of both orders."""
    tilt = math.exp(epsilon)
    return float(max(np.maximum(p - tilt * q, 0).sum(), np.maximum(q - tilt * p, 0).sum()))


def discrete_gaussian(sigma: float, shift: int, reach: int = 200) -> np.ndarray:
    z = np.arange(-reach, reach + 1)
    weights = np.exp(-((z - shift) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def skellam(variance: float, shift: int, reach: int = 200) -> np.ndarray:
    """The convolution of two Poisson laws, not Bessel functions."""
    k = np.arange(2 * reach + 1)
    mean = variance / 2
    with mpmath.workdps(30):
        factorials = [mpmath.factorial(int(n)) for n in k]
        poisson = np.array([float(mpmath.exp(-mean) * mpmath.mpf(mean) ** n / f) for n, f in enumerate(factorials)])
    masses = np.convolve(poisson, poisson[::-1])
    centre = 2 * reach - shift
    return masses[centre - reach : centre + reach + 1]


def answers(p: float, k: int, truth_is: int | None) -> np.ndarray:
    """Law of one randomized answer; uniform where nobody is there to answer."""
    law = np.full(k, 1 / k)
    if truth_is is not None:
        law *= p
        law[truth_is] += 1 - p
    return law


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(("neighbours", "moved"), [(ADDED, 1), (ZEROED, 1), (REPLACED, 2)])
def test_integer_noise_equals_its_enumeration(neighbours: Neighbours, moved: int, epsilon: float) -> None:
    for event, law in (
        (DiscreteGaussian(1.5, 2), lambda shift: discrete_gaussian(3.0, shift)),
        (Skellam(9.0, 2), lambda shift: skellam(9.0, shift)),
    ):
        low, high = one_step.delta_bounds(found(event, neighbours), epsilon)
        exact = divergence(law(2 * moved), law(0), epsilon)
        assert low == pytest.approx(exact, rel=1e-11, abs=1e-13)
        assert high == pytest.approx(exact, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("epsilon", [0.0, 0.4])
def test_sampled_groups_of_integer_noise_equal_their_enumeration(epsilon: float) -> None:
    rate, size = 0.3, 2
    weights = [(1 - rate) ** 2, 2 * rate * (1 - rate), rate**2]
    for relation, sign in ((NeighboringRelation.ADD_OR_REMOVE, 0), (NeighboringRelation.REPLACE_ONE, -1)):
        p = sum(w * discrete_gaussian(2.0, j) for j, w in enumerate(weights))
        q = sum(w * discrete_gaussian(2.0, sign * j) for j, w in enumerate(weights))
        bounds = one_step.delta_bounds(found(DiscreteGaussian(2.0), Neighbours(relation, size), rate), epsilon)
        assert bounds == pytest.approx([divergence(p, q, epsilon)] * 2, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize(("p", "k"), [(0.5, 2), (0.2, 5), (0.999, 3)])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
def test_randomized_response_equals_its_enumeration(p: float, k: int, epsilon: float) -> None:
    one = answers(p, k, 0)
    cases = [(ADDED, answers(p, k, None)), (ZEROED, answers(p, k, None)), (REPLACED, answers(p, k, 1))]
    for neighbours, other in cases:
        bounds = one_step.delta_bounds(found(RandomizedResponse(p, k), neighbours), epsilon)
        assert bounds == pytest.approx([divergence(one, other, epsilon)] * 2, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("relation", list(NeighboringRelation))
def test_sampled_randomized_response_of_a_group_equals_its_enumeration(relation: NeighboringRelation) -> None:
    p, k, rate, epsilon = 0.3, 3, 0.6, 0.5
    absent = answers(p, k, None)
    one = (1 - rate) * absent + rate * answers(p, k, 0)
    replaced = relation is NeighboringRelation.REPLACE_ONE
    other = (1 - rate) * absent + rate * answers(p, k, 1) if replaced else absent
    both = [np.array([math.prod(x) for x in itertools.product(law, repeat=3)]) for law in (one, other)]
    bounds = one_step.delta_bounds(found(RandomizedResponse(p, k), Neighbours(relation, 3), rate), epsilon)
    assert bounds == pytest.approx([divergence(*both, epsilon)] * 2, rel=1e-11, abs=1e-13)


def test_randomized_response_is_private_by_the_ratio_of_its_masses() -> None:
    """Two answers, 0.75 against 0.25: epsilon is log 3."""
    bounds = one_step.epsilon_bounds(found(RandomizedResponse(0.5, 2), REPLACED), 1e-12)
    assert bounds == pytest.approx([math.log(3)] * 2, rel=1e-9)


@pytest.mark.parametrize("rate", [1.0, 0.2])
@pytest.mark.parametrize("event", [RandomizedResponse(0.5, 2), RandomizedResponse(0.4, 6)], ids=str)
def test_many_answers_equal_the_multinomial_sum(event: RandomizedResponse, rate: float) -> None:
    """Forty steps under replacement: outcomes counted by how many answers speak for either category."""
    steps, epsilon = 40, 2.0
    other = (1 - rate * (1 - event.p)) / event.k
    likely = rate * (1 - event.p) + other
    exact = 0.0
    for ups in range(steps + 1):
        for downs in range(steps - ups + 1):
            ways = math.comb(steps, ups) * math.comb(steps - ups, downs)
            rest = (event.k - 2) * other
            p = ways * likely**ups * other**downs * rest ** (steps - ups - downs)
            q = ways * other**ups * likely**downs * rest ** (steps - ups - downs)
            exact += max(p - math.exp(epsilon) * q, 0.0)
    interval = PRVAccountant()._delta_interval(NormalForm(((found(event, REPLACED, rate), steps),)), epsilon)
    assert interval.lower * (1 - 1e-9) <= exact <= interval.upper * (1 + 1e-9)
    assert interval.upper - interval.lower <= 2e-3 * exact


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cells", [5, 37, 400])
@pytest.mark.parametrize(
    "component",
    [
        found(RandomizedResponse(0.5, 2), REPLACED),
        found(RandomizedResponse(0.3, 4), ADDED, 0.4),
        found(RandomizedResponse(0.3, 4), Neighbours(NeighboringRelation.REPLACE_ONE, 3)),
        FiniteOutcomes((Outcome(0.5, 0.2, math.log(2.5)), Outcome(0.4, 0.8, math.log(0.5)), Outcome(0.1, 0, math.inf))),
    ],
    ids=["two answers", "against uniform", "group", "infinite"],
)
def test_lattice_laws_enclose_the_hockey_stick(component: FiniteOutcomes, direction: str, cells: int) -> None:
    pair = component.pair(direction)  # type: ignore[arg-type]
    low, high = pair.support
    spacing = (high - low) / cells
    above = dominating(pair, spacing, (-20.0, 20.0), 1e-12)
    below = dominated(pair, spacing, (-20.0, 20.0), 1e-12)
    for epsilon in np.linspace(low - 0.1, high + 0.1, 41):
        assert curve(below, float(epsilon)) <= truth(pair, float(epsilon)) + 1e-14
        assert curve(above, float(epsilon)) >= truth(pair, float(epsilon)) - 1e-14
    assert above.infinite == below.infinite == pytest.approx(sum(o.p for o in pair.outcomes if o.loss == math.inf))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_moments_of_finite_outcomes_equal_mpmath(direction: str) -> None:
    t = np.array([1e-3, 0.5, 4.0, 800.0])
    for event in (RandomizedResponse(0.3, 5), RandomizedResponse(1 - 1e-7, 2), RandomizedResponse(1e-200, 3)):
        for neighbours in (ADDED, REPLACED):
            component = found(event, neighbours)
            assert isinstance(component, FiniteOutcomes)
            outcomes = component.pair(direction).outcomes  # type: ignore[arg-type]
            bounds = component.log_moments(direction, t)  # type: ignore[arg-type]
            with mpmath.workdps(260):
                p0, k = mpmath.mpf(event.p), event.k
                masses = [1 - p0 + p0 / k, *[p0 / k] * (k - 1)]
                others = [mpmath.mpf(1) / k] * k if neighbours is ADDED else [masses[1], masses[0], *masses[2:]]
                laws = (masses, others) if direction == "remove" else (others, masses)
                pairs = list(zip(*laws, strict=True))
                for moment, bound in zip(t, bounds, strict=True):
                    exact = mpmath.log(mpmath.fsum(a * (a / b) ** mpmath.mpf(moment) for a, b in pairs))
                    assert exact <= bound <= exact * (1 + mpmath.mpf("1e-8"))
            assert len(outcomes) <= 3


@pytest.mark.parametrize("wrong", [None, 0.9, 1.1])
def test_simulated_randomized_response_matches_only_its_own_probability(wrong: float | None) -> None:
    """Best attack on 400 000 real answers against the claimed delta; 10 % off either way is detected."""
    p, k, epsilon, runs = 0.5, 3, 0.4, 400_000
    rng = np.random.default_rng(5)

    def respond(true: int) -> np.ndarray:
        lying = rng.random(runs) < p * (wrong or 1.0)
        return np.where(lying, rng.integers(k, size=runs), true)

    claimed = one_step.delta_bounds(found(RandomizedResponse(p, k), REPLACED), epsilon)[1]
    measured = float((respond(0) == 0).mean() - math.exp(epsilon) * (respond(1) == 0).mean())
    error = 4 * (1 + math.exp(epsilon)) * 0.5 / math.sqrt(runs)
    assert (abs(measured - claimed) <= error) == (wrong is None)


def test_skellam_vector_bounds_the_exact_moments() -> None:
    """One coordinate moved, and two coordinates moved by one each, at whole and fractional orders."""
    t = np.array([0.3, 1.0, 2.0, 2.6, 7.0])
    for variance in (0.1, 0.5, 2.0, 10.0, 300.0):
        one = found(Skellam(variance), ADDED).log_moments("remove", t)
        for coordinates in (1, 2):
            vector = found(SkellamVector(variance, coordinates, math.sqrt(coordinates)), ADDED)
            bound = vector.log_moments("remove", t)
            assert np.all(bound >= coordinates * one * (1 - 1e-9))
        if variance == 300.0:  # and closely: at whole orders it is nearly the Gaussian's
            whole = np.array([1.0, 2.0, 7.0])
            assert vector.log_moments("add", whole) == pytest.approx(whole * (1 + whole) / 300, rel=3e-2)


def test_skellam_vector_has_the_published_values() -> None:
    """Order 2, worked by hand: 2 l2^2 / (2 v) + min((3 l2^2 + 6 l1) / (4 v^2), 3 l1 / (2 v)), either branch."""
    at_two = np.array([1.0])
    for variance, expected in ((0.5, 8.0 + min(30.0, 9.0)), (10.0, 0.4 + min(0.075, 0.45))):
        moment = found(SkellamVector(variance, 3, 2), ADDED).log_moments("remove", at_two)
        assert moment == pytest.approx([expected], rel=1e-12)


def test_replacing_or_grouping_scales_the_sensitivity_of_vectors() -> None:
    t = np.array([1.0, 3.0])
    twice = found(SkellamVector(9.0, 6, 4), ADDED).log_moments("add", t)
    assert np.array_equal(found(SkellamVector(9.0, 3, 2), REPLACED).log_moments("add", t), twice)
    group = Neighbours(NeighboringRelation.ZERO_OUT, 2)
    assert np.array_equal(found(SkellamVector(9.0, 3, 2), group).log_moments("add", t), twice)


def test_discrete_noise_approaches_the_gaussian() -> None:
    gaussian_delta = 0.5 * math.erfc(-1 / (2 * 2.0) / math.sqrt(2)) * 2 - 1  # total variation at multiplier 2
    for event in (DiscreteGaussian(2.0, 500), Skellam(1e6, 500)):
        assert one_step.delta_bounds(found(event, ADDED), 0.0)[1] == pytest.approx(gaussian_delta, rel=1e-5)


def test_no_noise_reveals_the_data_and_uniform_answers_nothing() -> None:
    for event in (DiscreteGaussian(0.0), Skellam(0.0), SkellamVector(0.0, 1, 1), RandomizedResponse(0.0, 3)):
        assert component_of(event, ADDED) is None
    assert one_step.epsilon_bounds(found(RandomizedResponse(1.0, 3), REPLACED), 1e-9) == (0.0, 0.0)


@pytest.mark.parametrize(
    "event",
    [DiscreteGaussian(1.5, 3), Skellam(7.0, 2), SkellamVector(7.0, 4.0, 2.5), RandomizedResponse(0.25, 7)],
    ids=str,
)
def test_events_survive_json(event: Event) -> None:
    assert Event.from_json(event.to_json()) == event


def test_location_is_in_grid_units() -> None:
    assert location_of(DiscreteGaussian(1.5, 4)) == ("discrete_gaussian", 6.0, 4)
    assert location_of(Skellam(8.0, 3)) == ("skellam", 8.0, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DiscreteGaussian(-1.0),
        lambda: DiscreteGaussian(1.0, 0),
        lambda: DiscreteGaussian(1.0, 1.5),  # type: ignore[arg-type]
        lambda: Skellam(math.inf),
        lambda: Skellam(1.0, -1),
        lambda: SkellamVector(1.0, 1.0, 2.0),
        lambda: SkellamVector(1.0, 0.0, 0.0),
        lambda: RandomizedResponse(1.2),
        lambda: RandomizedResponse(0.5, 1),
        lambda: RandomizedResponse(math.nan),
    ],
)
def test_parameters_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(ParameterError):
        make()  # type: ignore[operator]


def test_sampling_of_skellam_vectors_is_refused() -> None:
    with pytest.raises(UnsupportedEventError, match="Poisson sampling"):
        component_of(SkellamVector(1.0, 1, 1), ADDED, 0.5)
