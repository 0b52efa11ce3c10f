"""What a report's releases mean, against the closed forms of the Gaussian mechanism."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import pytest

from accountants import Gaussian, NeighboringRelation, PoissonSampled
from dpdl.readings import DELTAS, FAILURE, Readings, Spent, readings

NORMAL = NormalDist()
DELTA = 1e-5
SIGMA, STEPS, TAKEN = 8.0, 16, 4
WHOLE_BATCH = PoissonSampled(1.0, Gaussian(SIGMA))


def mu(steps: int, sigma: float = SIGMA) -> float:
    """Dong, Roth, Su 2019: how many standard deviations apart the two neighbours are, for steps on all the data."""
    return math.sqrt(steps) / sigma


def gaussian_epsilon(apart: float, delta: float) -> float:
    """Balle and Wang 2018, theorem 8, by bisection."""

    def delta_at(epsilon: float) -> float:
        a, b = apart / 2 - epsilon / apart, -apart / 2 - epsilon / apart
        return NORMAL.cdf(a) - math.exp(epsilon) * NORMAL.cdf(b)

    low, high = 0.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


def read(
    taken: int = TAKEN, others: dict[Gaussian, int] | None = None, deltas: tuple[float, ...] = (), **changes: object
) -> Readings:
    spent = {
        "run": {WHOLE_BATCH: taken, **(others or {})},
        "step": WHOLE_BATCH,
        "steps": taken,
        "planned_steps": STEPS,
        "dataset": None,
        "guarantee": None,
        "relation": NeighboringRelation.ADD_OR_REMOVE,
    }
    return readings(Spent(**{**spent, **changes}), delta=DELTA, deltas=deltas)  # type: ignore[arg-type]


def test_epsilon_at_each_delta_so_far_and_planned() -> None:
    rows = read(deltas=(3e-6,)).at_deltas
    assert [row.delta for row in rows] == sorted({*DELTAS, DELTA, 3e-6}, reverse=True)
    for row in rows:
        assert row.so_far == pytest.approx(gaussian_epsilon(mu(TAKEN), row.delta), rel=1e-4)
        assert row.planned == pytest.approx(gaussian_epsilon(mu(STEPS), row.delta), rel=1e-4)
        assert row.all_runs is None


def test_epsilon_over_the_steps_is_that_of_each_number_of_steps() -> None:
    points = read().over_steps
    assert points is not None
    steps = [point.step for point in points]
    assert (steps[0], steps[-1]) == (0, STEPS)
    assert TAKEN in steps
    assert steps == sorted(set(steps))
    assert [point.planned for point in points] == [step > TAKEN for step in steps]
    assert points[0].epsilon == 0.0
    for point in points[1:]:
        assert point.epsilon == pytest.approx(gaussian_epsilon(mu(point.step), DELTA), rel=1e-4)
        assert point.epsilon >= gaussian_epsilon(mu(point.step), DELTA) * (1 - 1e-9)


def test_other_releases_count_from_the_first_step_on() -> None:
    other = Gaussian(5.0)
    points = read(others={other: 1}).over_steps
    assert points is not None
    for point in points:
        apart = math.hypot(mu(point.step), mu(1, 5.0))
        assert point.epsilon == pytest.approx(gaussian_epsilon(apart, DELTA), rel=1e-4)


def test_the_trade_off_curve_is_never_above_the_best_attack() -> None:
    curve = read().trade_off
    assert curve is not None
    assert (curve.alpha[0], curve.alpha[-1]) == (0.0, 1.0)
    assert all(a < b for a, b in itertools.pairwise(curve.alpha))
    for alpha, beta in list(zip(curve.alpha, curve.beta, strict=True))[1:-1]:
        best = NORMAL.cdf(NORMAL.inv_cdf(1 - alpha) - mu(TAKEN))
        assert best - 2e-3 <= beta <= best + 1e-12


def test_attackers_are_bounded_by_what_the_best_one_does() -> None:
    bounds = read().membership
    assert bounds is not None
    apart = mu(TAKEN)
    best = 2 * NORMAL.cdf(apart / 2) - 1
    assert best <= bounds.advantage * (1 + 1e-12) <= best + 1e-6
    assert bounds.accuracy == pytest.approx((1 + best) / 2, abs=1e-6)
    for false, true in bounds.true_positive_rates:
        exact = NORMAL.cdf(NORMAL.inv_cdf(false) + apart)
        assert exact * (1 - 1e-9) <= true <= exact + 2e-3
    assert [false for false, _ in bounds.true_positive_rates] == [1e-3, 1e-2, 1e-1]


def test_a_belief_is_exceeded_as_rarely_as_is_said() -> None:
    """The privacy loss of Gaussians is normal, with mean mu^2 / 2 under membership."""
    bounds = read().membership
    assert bounds is not None
    apart = mu(TAKEN)
    loss = NormalDist(apart**2 / 2, apart)
    for prior, after in bounds.posteriors:
        needed = math.log(after / (1 - after)) - math.log(prior / (1 - prior))
        assert 1 - loss.cdf(needed) <= bounds.failure == FAILURE
        assert needed < 2 * loss.inv_cdf(1 - FAILURE), "not a bound that says nothing"


def test_all_runs_on_the_data_have_bounds_of_their_own() -> None:
    found = read(dataset={WHOLE_BATCH: STEPS})
    assert found.membership is not None
    assert found.dataset_membership is not None
    assert found.dataset_membership.advantage == pytest.approx(2 * NORMAL.cdf(mu(STEPS) / 2) - 1, abs=1e-6)
    assert found.dataset_membership.advantage > found.membership.advantage
    assert found.at_deltas[0].all_runs == pytest.approx(gaussian_epsilon(mu(STEPS), 1e-3), rel=1e-4)


def test_without_a_guarantee_there_is_nothing_to_draw() -> None:
    exact = PoissonSampled(1.0, Gaussian(0.0))
    found = read(run={exact: TAKEN}, step=exact)
    assert (found.over_steps, found.trade_off, found.membership, found.dataset_membership) == (None,) * 4
    assert all(math.isinf(row.so_far) for row in found.at_deltas)
    beside = read(dataset={exact: 1})
    assert beside.membership is not None
    assert beside.dataset_membership is None
    assert beside.at_deltas[0].all_runs == math.inf
    assert beside.to_dict()["at_deltas"][0]["all_runs"] == "inf"


def test_nothing_released_shows_nothing() -> None:
    found = read(taken=0)
    assert found.membership is not None
    assert found.trade_off is not None
    assert found.membership.advantage == 0.0
    assert found.membership.accuracy == pytest.approx(0.5, abs=1e-12)
    assert all(
        beta == pytest.approx(1 - alpha)
        for alpha, beta in zip(found.trade_off.alpha, found.trade_off.beta, strict=True)
    )
    assert found.over_steps is not None
    assert [point.planned for point in found.over_steps][:2] == [False, True]
