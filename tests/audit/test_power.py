"""What an audit says it would have seen: held against simulated audits, and against plain sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import dpdl
from dpdl.audit.many_runs import audit_many_runs
from dpdl.audit.one_run import bound_from_canaries_as_runs
from dpdl.audit.power import leak_of, least_shortfall, note_on_power, runs_see
from dpdl.audit.transcript import statistics_of

DELTA = 1e-5
SELDOM = dpdl.PrivacyPlan(sample_rate=0.1, expected_batch_size=100, steps=60, noise_multiplier=1.425, max_grad_norm=1.0)
OFTEN = replace(SELDOM, sample_rate=0.5, steps=20, noise_multiplier=3.325)


def moves(plan: dpdl.PrivacyPlan, n: int, *, seed: int) -> Any:
    """Of n canaries that are in, and n that are not."""
    generator = np.random.default_rng(seed)
    noise = plan.noise_multiplier * generator.standard_normal((plan.steps, 2 * n))
    noise[:, :n] += generator.random((plan.steps, n)) < plan.sample_rate
    return noise


def shortfall(plan: dpdl.PrivacyPlan, *, known: bool = True, count: int = 1000) -> float:
    claim: dict[str, Any] = {"epsilon": plan.epsilon(DELTA), "delta": DELTA}
    leak = leak_of(plan if known else None, **claim)
    found = least_shortfall(leak, runs_see("gaussian", trials=count // 4, confidence=0.95, **claim))
    assert found is not None
    return found


def test_seldom_sampling_hides_what_the_claim_alone_would_show() -> None:
    assert shortfall(SELDOM, known=False) < 2 < shortfall(SELDOM)
    assert shortfall(OFTEN, count=4000) < 2


@pytest.mark.parametrize(("plan", "count"), [(SELDOM, 1000), (OFTEN, 4000)])
def test_noise_that_is_called_visible_is_seen_and_less_is_not(plan: dpdl.PrivacyPlan, count: int) -> None:
    factor = shortfall(plan, count=count)

    def seen(noise: float, seed: int) -> bool:
        audited = moves(replace(plan, noise_multiplier=plan.noise_multiplier * noise), count // 2, seed=seed)
        mixed = np.random.default_rng(seed).permutation(count)
        coins = (np.arange(count) < count // 2)[mixed]
        scores = {name: (values, coins) for name, values in statistics_of(audited[:, mixed]).items()}
        claim: dict[str, Any] = {"claimed_epsilon": plan.epsilon(DELTA), "curve": "gaussian", "delta": DELTA}
        return not bound_from_canaries_as_runs(scores, attack="simulated", confidence=0.95, **claim).consistent

    assert sum(seen(1 / factor, seed) for seed in range(10)) >= 7
    assert sum(seen(1 / (1 + 0.3 * (factor - 1)), seed) for seed in range(10)) <= 3


def test_rates_of_the_plan_are_those_of_simulated_canaries() -> None:
    n = 200_000
    plan = replace(SELDOM, steps=8)
    noisy = moves(plan, n, seed=0)
    for rates, scores in zip(leak_of(plan, epsilon=1, delta=DELTA)(1.0), (noisy.sum(0), noisy.max(0)), strict=True):
        for level in (0.3, 0.05):
            threshold = np.quantile(scores[n:], 1 - level)
            stated = np.interp(-level, -rates.false_positives, rates.false_negatives)
            assert stated == pytest.approx((scores[:n] <= threshold).mean(), abs=0.006)


def test_the_note_says_what_and_that_it_is_little() -> None:
    claim: dict[str, Any] = {"epsilon": SELDOM.epsilon(DELTA), "delta": DELTA}

    def note(plan: dpdl.PrivacyPlan | None, trials: int) -> str:
        sees = runs_see("gaussian", trials=trials, confidence=0.95, **claim)
        return note_on_power(sees, what="canaries", plan=plan, **claim)

    assert "could have seen only gross faults: take more canaries" in note(SELDOM, 250)
    assert "gross" not in note(SELDOM, 25_000)
    assert "not even noise of" in note(SELDOM, 5)
    assert "give the plan to know" in note(None, 250)


def test_many_runs_carry_the_note_of_a_claim_and_none_without() -> None:
    generator = np.random.default_rng(0)

    def run(present: bool) -> float:
        return float(present + generator.standard_normal())

    found = audit_many_runs(run, runs=400, delta=DELTA, claimed_epsilon=4.38, curve="gaussian")
    assert "400 runs of each kind: noise of" in found.notes[0]
    assert "a weaker one sees less" in found.notes[0]
    assert audit_many_runs(run, runs=40, delta=DELTA).notes == ()
    assert audit_many_runs(run, runs=40, delta=DELTA, claimed_epsilon=float("inf")).notes == ()
