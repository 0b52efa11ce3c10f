"""Matrix mechanisms: reduction to rounds, and sensitivity against every pattern of participation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from accountants import ParameterError, PRVAccountant
from accountants.events import Gaussian, MatrixFactorization, PoissonSampled, participation_sensitivity
from accountants.reduction.normal_form import normal_form
from accountants.relation import NeighboringRelation


@pytest.mark.parametrize("relation", list(NeighboringRelation))
def test_one_band_is_dp_sgd(relation: NeighboringRelation) -> None:
    banded = MatrixFactorization(1.1, 1, 70, 0.02)
    assert normal_form(banded, relation) == normal_form(70 * PoissonSampled(0.02, Gaussian(1.1)), relation)


@pytest.mark.parametrize(("steps", "bands", "rounds"), [(100, 10, 10), (101, 10, 11), (9, 10, 1), (0, 3, 0)])
def test_an_example_takes_part_once_in_every_band(steps: int, bands: int, rounds: int) -> None:
    event = MatrixFactorization(2.0, bands, steps)
    assert event.rounds == rounds
    bound = PRVAccountant().compose(event).epsilon(1e-5)
    assert bound == pytest.approx(PRVAccountant().compose(Gaussian(2.0), rounds).epsilon(1e-5), rel=1e-12)
    sampled = MatrixFactorization(2.0, bands, steps, 0.1)
    assert normal_form(sampled, NeighboringRelation.ADD_OR_REMOVE) == normal_form(
        rounds * PoissonSampled(0.1, Gaussian(2.0)), NeighboringRelation.ADD_OR_REMOVE
    )


def patterns(steps: int, separation: int, most: int) -> list[tuple[int, ...]]:
    return [
        chosen
        for count in range(1, most + 1)
        for chosen in itertools.combinations(range(steps), count)
        if all(b - a >= separation for a, b in itertools.pairwise(chosen))
    ]


def worst_sum(strategy: np.ndarray, separation: int, most: int) -> float:
    """The greatest sum of |C^T C| over a pattern."""
    products = np.abs(strategy.T @ strategy)
    return max(float(products[np.ix_(p, p)].sum()) for p in patterns(strategy.shape[1], separation, most))


def banded(steps: int, bands: int, seed: int) -> np.ndarray:
    matrix = np.tril(np.random.default_rng(seed).normal(size=(steps, steps)))
    return matrix - np.tril(matrix, -bands)


@pytest.mark.parametrize("separation", [1, 2, 3, 5])
@pytest.mark.parametrize("most", [1, 2, 4, 9])
@pytest.mark.parametrize("seed", range(3))
def test_sensitivity_bounds_every_pattern_and_is_exact_where_columns_are_orthogonal(
    separation: int, most: int, seed: int
) -> None:
    for bands in (1, 2, 3, 9):
        strategy = banded(9, bands, seed)
        exact = math.sqrt(worst_sum(strategy, separation, most))
        bound = participation_sensitivity(strategy, min_separation=separation, max_participations=most)
        assert bound >= exact
        if bands <= separation:
            assert bound == pytest.approx(exact, rel=1e-11)


def test_sensitivity_of_simple_strategies() -> None:
    once = participation_sensitivity(banded(6, 6, 1), min_separation=1, max_participations=1)
    assert once == pytest.approx(max(np.linalg.norm(banded(6, 6, 1), axis=0)), rel=1e-11)
    prefix_sums = np.tril(np.ones((8, 8)))
    # Steps 0 and 4 share four rows: columns of norm^2 8 and 4, product 4.
    assert participation_sensitivity(prefix_sums, min_separation=4, max_participations=2) == pytest.approx(
        math.sqrt(8 + 4 + 2 * 4), rel=1e-11
    )
    identity = participation_sensitivity(np.eye(1000), min_separation=10, max_participations=10**9)
    assert identity == pytest.approx(10, rel=1e-11)


def test_no_contributions_of_one_example_move_the_release_further() -> None:
    """Random contributions of norm 1 in every pattern, adversarially aligned or not."""
    generator = np.random.default_rng(3)
    strategy = banded(7, 4, 5)
    bound = participation_sensitivity(strategy, min_separation=2, max_participations=3)
    for pattern in patterns(7, 2, 3):
        for _ in range(20):
            gradient = np.zeros((7, 2))
            directions = generator.normal(size=(len(pattern), 2))
            gradient[list(pattern)] = directions / np.linalg.norm(directions, axis=1, keepdims=True)
            assert np.linalg.norm(strategy @ gradient) <= bound


@pytest.mark.parametrize(
    "fields",
    [
        {"strategy": np.eye(3), "min_separation": 0, "max_participations": 1},
        {"strategy": np.eye(3), "min_separation": 1, "max_participations": 0},
        {"strategy": [1.0, 2.0], "min_separation": 1, "max_participations": 1},
        {"strategy": [[math.nan]], "min_separation": 1, "max_participations": 1},
    ],
)
def test_sensitivity_refuses_what_is_no_strategy(fields: dict) -> None:
    with pytest.raises(ParameterError):
        participation_sensitivity(**fields)
