"""Several units at once: Poisson-sampled groups enumerated in full, and the limits that must agree."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from accountants import PRVAccountant, RDPAccountant
from accountants.engines import one_step
from accountants.events import Event, Gaussian, Group, Laplace, MatrixFactorization, PoissonSampled, Shuffled
from accountants.reduction.normal_form import normal_form
from accountants.relation import NeighboringRelation
from tests.accountants.hockey_stick import divergence, gaussian_mixture, laplace_mixture

EPSILONS = (0.0, 0.2, 0.6, 1.5, 3.0)
Centres = list[tuple[float, float]]


def drawn(values: tuple[float, ...], rate: float) -> Centres:
    """Every subset of the group."""
    return [
        (
            sum(v for v, one in zip(values, kept, strict=True) if one),
            math.prod(rate if one else 1 - rate for one in kept),
        )
        for kept in itertools.product((False, True), repeat=len(values))
    ]


def pairs(size: int, rate: float, relation: str) -> Iterator[tuple[Centres, Centres]]:
    choices = list(itertools.product((-1.0, 0.3, 1.0), repeat=size))
    if relation == "replace_one":
        for a, b in itertools.combinations(choices, 2):
            yield drawn(a, rate), drawn(b, rate)
    else:
        for a in choices:
            yield drawn(a, rate), [(0.0, 1.0)]


@pytest.mark.parametrize(("make", "density"), [(Gaussian, gaussian_mixture), (Laplace, laplace_mixture)])
@pytest.mark.parametrize("relation", ["add_or_remove", "zero_out", "replace_one"])
@pytest.mark.parametrize(("size", "rate"), [(2, 0.3), (3, 0.1), (2, 1.0)])
def test_groups_attain_the_claim_and_never_exceed_it(
    make: Callable[[float], Event], density: Callable, relation: str, size: int, rate: float
) -> None:
    scale = 1.5
    ((one, _),) = normal_form(Group(PoissonSampled(rate, make(scale)), size), NeighboringRelation.of(relation)).counts
    grid = np.linspace(-27, 27, 27001)
    cell = grid[1] - grid[0]

    def truth(noise: float) -> list[float]:
        result = np.zeros(len(EPSILONS))
        for first, second in pairs(size, rate, relation):
            p, q = density(grid, noise, first), density(grid, noise, second)
            for a, b in ((p, q), (q, p)):
                result = np.maximum(result, [divergence(a, b, epsilon, cell) for epsilon in EPSILONS])
        return list(result)

    for exact, epsilon in zip(truth(scale), EPSILONS, strict=True):
        low, high = one_step.delta_bounds(one, epsilon)
        assert exact == pytest.approx(low, abs=2e-5)
        assert exact == pytest.approx(high, abs=2e-5)
    assert truth(0.9 * scale)[1] > one_step.delta_bounds(one, EPSILONS[1])[1] + 1e-3


@pytest.mark.parametrize("relation", list(NeighboringRelation))
def test_a_group_of_one_is_the_event_itself(relation: NeighboringRelation) -> None:
    for event in (PoissonSampled(0.1, Gaussian(1.0)), Gaussian(2.0), MatrixFactorization(1.0, 2, 9, 0.1)):
        assert normal_form(Group(event, 1), relation) == normal_form(event, relation)


def test_un_sampled_noise_moves_by_the_size_of_the_group() -> None:
    for grouped, plain in (
        (Group(Gaussian(3.0) * 4, 3), Gaussian(1.0) * 4),
        (Group(Laplace(6.0), 4), Laplace(1.5)),
        (Group(Shuffled(1, Gaussian(2.0)), 2), Gaussian(1.0)),
        (Group(Shuffled(9, Gaussian(2.0)), 2), Gaussian(1.0)),
        (Group(MatrixFactorization(6.0, 3, 10), 3), Gaussian(2.0) * 4),
    ):
        assert PRVAccountant().compose(grouped).epsilon(1e-5) == pytest.approx(
            PRVAccountant().compose(plain).epsilon(1e-5), rel=1e-9
        )


def test_larger_groups_cost_more_and_a_replacement_less_than_an_addition_and_a_removal() -> None:
    event = 500 * PoissonSampled(0.01, Gaussian(1.0))
    single = PRVAccountant().compose(event).epsilon(1e-6)
    epsilons = [PRVAccountant().compose(Group(event, size)).epsilon(1e-6) for size in (1, 2, 4)]
    assert epsilons[0] == single
    assert single < epsilons[1] < epsilons[2]
    replaced = PRVAccountant(relation="replace_one").compose(event).epsilon(1e-6)
    assert single < replaced < epsilons[1] * 1.2


@pytest.mark.parametrize("relation", ["add_or_remove", "replace_one"])
@pytest.mark.parametrize(("noise", "rate", "size"), [(0.05, 0.5, 2), (1.0, 1e-7, 100), (1e3, 0.9, 1000)])
def test_extremes_answer_without_warnings(noise: float, rate: float, size: int, relation: str) -> None:
    event = Group(PoissonSampled(rate, Gaussian(noise)), size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = PRVAccountant(relation=relation).compose(event).interval(1e-9)
        loose = RDPAccountant(relation=relation).compose(event).epsilon(1e-9)
    assert 0 <= low <= high < math.inf
    assert loose >= low
