"""Private selection: its epsilon against formulas worked out in mpmath, its draws, and what it publishes."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest

from accountants import PRVAccountant, RepeatAndSelect, Repetitions
from dpdl.errors import ParameterError
from dpdl.plan import PrivacyPlan
from dpdl.tradeoff import Point, epsilon_of_selection
from dpdl.tradeoff.journal import JOURNAL
from dpdl.tradeoff.selection import draw, runs_drawn
from tests.tradeoff import small_training
from tests.tradeoff.small_training import small

DELTA = 1e-5


def plan(noise: float, steps: int, rate: float = 1.0) -> PrivacyPlan:
    return PrivacyPlan(
        sample_rate=rate, expected_batch_size=100 * rate, steps=steps, noise_multiplier=noise, max_grad_norm=1.0
    )


def gamma_of(mean: float, shape: float) -> mpmath.mpf:
    """gamma of the law with this mean, from the formulas of the paper (definition 1, and its limit at 0)."""

    def excess(log_inverse: mpmath.mpf) -> mpmath.mpf:
        gamma = mpmath.exp(-log_inverse)
        if shape == 0:
            return (1 / gamma - 1) / mpmath.log(1 / gamma) - mean
        return shape * (1 - gamma) / (gamma * (1 - gamma**shape)) - mean

    return mpmath.exp(-mpmath.findroot(excess, (mpmath.mpf("0.01"), mpmath.mpf(12)), solver="anderson"))


def theorem_2(curve: Any, orders: list[float], mean: float, shape: float) -> float:
    """The least epsilon over the orders, term by term as the theorem and the conversion are printed."""
    gamma = gamma_of(mean, shape)
    one = min((1 - 1 / mpmath.mpf(b)) * curve(b) + mpmath.log(1 / gamma) / b for b in orders)
    return float(
        min(
            curve(a)
            + mpmath.log(mean) / (a - 1)
            + (1 + shape) * one
            + mpmath.log(1 - 1 / mpmath.mpf(a))
            - (mpmath.log(DELTA) + mpmath.log(a)) / (a - 1)
            for a in orders
        )
    )


@pytest.mark.parametrize(("mean", "shape"), [(20.0, 0.0), (5.0, 1.0), (60.0, 0.5)])
def test_plain_gaussians_cost_what_the_theorem_says(mean: float, shape: float) -> None:
    rho = 8 / (2 * 9.0**2)  # eight steps of noise 9
    orders = [float(1 + t) for t in np.geomspace(0.2, 300, 1500)]
    expected = theorem_2(lambda a: rho * mpmath.mpf(a), orders, mean, shape)
    found = epsilon_of_selection([plan(9.0, 8)], Repetitions(mean=mean, shape=shape), delta=DELTA)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found <= expected  # a continuous order proves no less than a grid of them
    without = theorem_2(lambda a: rho * mpmath.mpf(a), orders, 1.0 + 1e-9, shape) if shape else 0.0
    assert abs(without - found) > 0.05, "the cost of the choice would not be seen"


def sampled_gaussian(order: int, rate: float, noise: float, steps: int) -> mpmath.mpf:
    """Rényi divergence at a whole order: Mironov, Talwar and Zhang (2019), the sum over binomials."""
    q, total = mpmath.mpf(rate), mpmath.mpf(0)
    for k in range(order + 1):
        total += (
            mpmath.binomial(order, k)
            * (1 - q) ** (order - k)
            * q**k
            * mpmath.exp((k * k - k) / (2 * mpmath.mpf(noise) ** 2))
        )
    return steps * mpmath.log(total) / (order - 1)


def test_candidates_of_several_plans_cost_what_the_dearest_does_at_each_order() -> None:
    pairs = [(2.0, 60, 0.05), (1.2, 20, 0.02)]  # noise, steps, rate: which one is dearer depends on the order
    mean, shape = 12.0, 1.0

    def worst(order: float) -> mpmath.mpf:
        return max(sampled_gaussian(int(order), rate, noise, steps) for noise, steps, rate in pairs)

    expected = theorem_2(worst, [float(order) for order in range(2, 40)], mean, shape)
    plans = [plan(*pair) for pair in pairs]
    law = Repetitions(mean=mean, shape=shape)
    found = epsilon_of_selection(plans, law, delta=DELTA)
    assert found <= expected * (1 + 1e-9)  # whole orders prove less
    assert found == pytest.approx(expected, rel=0.03)
    assert found >= max(epsilon_of_selection([p], law, delta=DELTA) for p in plans)


@pytest.mark.parametrize("shape", [0.0, 2.0, math.inf])
def test_one_plan_costs_what_the_accountant_says_of_the_event(shape: float) -> None:
    one = plan(1.5, 200, 0.02)
    event = RepeatAndSelect(one.event(), mean=8.0, shape=shape)
    expected = PRVAccountant().compose(event).epsilon(DELTA)
    found = epsilon_of_selection([one], Repetitions(mean=8.0, shape=shape), delta=DELTA)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found > one.epsilon(DELTA)


def test_draws_follow_the_law_and_reach_every_candidate() -> None:
    law = Repetitions(mean=4.0, shape=1.0)
    drawn = [draw(3, law, None) for _ in range(4000)]
    counts = np.array([len(one["picks"]) for one in drawn])
    deviation = math.sqrt(4.0 * 3.0 / 4000)  # of the mean: a geometric law with mean 4
    assert abs(counts.mean() - 4.0) < 5 * deviation
    assert abs(counts.mean() - 4.5) > 5 * deviation, "another mean would pass"
    picks = Counter(pick for one in drawn for pick in one["picks"])
    total = sum(picks.values())
    assert set(picks) == {0, 1, 2}
    assert all(abs(picks[i] / total - 1 / 3) < 5 * math.sqrt(2 / 9 / total) for i in picks)
    ties = [tie for one in drawn for tie in one["ties"]]
    assert len(set(ties)) == len(ties)


def test_a_candidate_drawn_twice_has_noise_of_its_own_even_with_an_insecure_seed() -> None:
    candidate = Point(key="a", plan=plan(1.0, 1), delta=DELTA, target=1.0, batch_size=100, seed=0)
    first, second = runs_drawn([candidate], {"picks": [0, 0], "ties": [1, 2]}, insecure_seed=4)
    assert first.execution.insecure_seed != second.execution.insecure_seed


CHOICE: dict[str, Any] = {
    "epsilons": (2.0,),
    "max_grad_norms": (0.5, 1.0),
    "held_out": "public",
    "select": Repetitions(mean=6.0, shape=1.0),
    "insecure_seed": 11,
    "threads": 1,
}


def test_the_best_run_is_published_alone_within_the_budget(tmp_path: Path) -> None:
    result = small(**CHOICE, output=tmp_path)
    secret = [json.loads(line) for line in (tmp_path / "secret" / JOURNAL).read_text().splitlines()]
    scores = [line["row"]["score"] for line in secret if "row" in line]
    assert len(scores) > 1, "choose another seed: there was no choice"
    chosen = result.rows[0]
    assert chosen.score == max(scores)
    assert len(set(scores)) == len(scores)
    assert len(result.rows) == 1

    claim = result.selection
    assert claim is not None
    assert claim.epsilon <= 2.0
    assert claim.epsilon > 1.99, "the budget is not used"
    assert claim.epsilon_of_one_run < claim.epsilon == chosen.epsilon
    assert result.epsilon_of_all == claim.epsilon
    assert (tmp_path / "selected" / "weights.txt").read_text() == repr(chosen.score)
    assert (tmp_path / "secret").stat().st_mode & 0o077 == 0


def test_nothing_published_tells_how_many_runs_there_were(tmp_path: Path) -> None:
    result = small(**CHOICE, output=tmp_path)
    text = result.to_json()
    assert "run-" not in text
    assert result.rows[0].seconds is None
    assert '"picks"' not in text
    assert any("stay secret" in remark for remark in result.remarks)
    with pytest.raises(ParameterError, match="chosen privately"):
        result.plot(tmp_path / "plot.png")


def test_a_selection_resumed_draws_nothing_again(tmp_path: Path) -> None:
    settings = {k: v for k, v in CHOICE.items() if k != "insecure_seed"}
    first = small(**settings, output=tmp_path)
    before = (tmp_path / "secret" / JOURNAL).read_bytes()
    again = small(**settings, output=tmp_path, resume=True)
    assert (tmp_path / "secret" / JOURNAL).read_bytes() == before
    assert again.to_dict() == first.to_dict()


def test_failed_runs_lose_and_are_not_tried_again(tmp_path: Path) -> None:
    result = small(small_training.train_or_fail, **CHOICE, output=tmp_path)
    assert all(row.seed == 0 for row in result.rows)
    before = (tmp_path / "secret" / JOURNAL).read_bytes()
    small(small_training.train_or_fail, **CHOICE, output=tmp_path, resume=True)
    assert (tmp_path / "secret" / JOURNAL).read_bytes() == before
    lost = small(small_training.train_or_fail, **{**CHOICE, "seeds": (1,)})
    assert lost.rows == ()
    assert lost.selection is not None
    assert lost.selection.chosen is None


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"held_out": "private"}, "held_out='public'"),
        ({"baseline": True}, "baseline=False"),
        ({"epsilons": (1.0, 2.0)}, "one epsilon"),
        ({"select": 20}, "accountants.Repetitions"),
        ({"epsilons": (1e-8,), "delta": 1e-12}, "out of reach"),
    ],
)
def test_what_the_theorem_does_not_cover_is_refused(changed: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=word):
        small(**{**CHOICE, **changed, "output": tmp_path / "out"})
    assert not (tmp_path / "out").exists()
