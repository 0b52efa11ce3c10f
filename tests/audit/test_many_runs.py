"""Audits of many runs: simulated ones with a known epsilon, and tiny ones through make_private."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import dpdl
from dpdl.audit.gradient_canaries import DirectionsOnly
from dpdl.audit.many_runs import audit_many_runs, bound_from_runs
from dpdl.audit.result import AuditResult
from dpdl.audit.transcript import Transcript, statistics_of
from dpdl.errors import ParameterError
from tests.audit.planted import CORRECT, HALVED, NO_CLIP, SAME_KEY, trainer

DELTA = 1e-5
TRUTH = 4.377  # epsilon at DELTA of mu = 1


def simulated(mu: float, *, n: int = 200, seed: int = 0, **settings: Any) -> AuditResult:
    generator = np.random.default_rng(seed)
    with_it = {"good": generator.standard_normal(n) - mu, "bad": generator.standard_normal(n)}
    without = {"good": generator.standard_normal(n), "bad": generator.standard_normal(n)}
    given: dict[str, Any] = {"delta": DELTA, "confidence": 0.9}
    return bound_from_runs(with_it, without, **{**given, **settings})


@pytest.mark.parametrize("curve", ["any", "gaussian"])
def test_of_gaussians_with_known_epsilon_the_bound_covers(curve: Any) -> None:
    found = [simulated(1.0, seed=seed, curve=curve).epsilon_lower for seed in range(30)]
    assert sum(bound > TRUTH for bound in found) <= 3
    assert np.median(found) > (1.0 if curve == "gaussian" else 0.3)
    assert sum(simulated(0.0, seed=seed, curve=curve).epsilon_lower > 0 for seed in range(30)) <= 3


def test_a_wrong_scale_is_rejected() -> None:
    assert all(simulated(2.5, seed=seed, curve="gaussian", claimed_epsilon=TRUTH).consistent is False
               for seed in range(20))  # fmt: skip


def test_randomised_response_with_known_epsilon_is_covered_and_nearly_reached() -> None:
    """Answers are scores: truthful with probability e^eps / (1 + e^eps), so that epsilon is known at delta 0."""
    epsilon, n, found = 1.5, 2000, []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        lies = [generator.random(n) > 1 / (1 + math.exp(-epsilon)) for _ in range(2)]
        scores = ({"answer": (~lies[0]).astype(float)}, {"answer": lies[1].astype(float)})
        found.append(bound_from_runs(*scores, delta=1e-9, confidence=0.9).epsilon_lower)
    assert sum(bound > epsilon for bound in found) <= 2
    assert np.median(found) > 1.2


def test_the_test_is_chosen_on_one_half_and_counted_on_the_other() -> None:
    """A score that tells apart in the first half only is chosen, and then shows nothing."""
    n = 200
    first = np.arange(n) < n // 2
    with_it, without = {"score": np.where(first, 1.0, 0.0)}, {"score": np.zeros(n)}
    assert bound_from_runs(with_it, without, delta=DELTA, confidence=0.9).epsilon_lower == 0
    everywhere = bound_from_runs({"score": np.ones(n)}, without, delta=DELTA, confidence=0.9)
    assert everywhere.epsilon_lower == pytest.approx(math.log(0.95 / 0.05), abs=0.7)  # of 100 runs without an error


def run_of(plan: dpdl.PrivacyPlan, fault: str) -> Callable[[bool], dict[str, float]]:
    """A run on three examples, with the first or without it, seeded by its number."""
    numbers = iter(range(10_000))

    def run(present: bool) -> dict[str, float]:
        model = DirectionsOnly(count=3)
        model.coins = torch.tensor([present, True, True])
        with Transcript([model.watched]) as seen:
            trainer(plan, fault=fault, insecure_seed=next(numbers), self_check=False, engine="loop")(
                model, model.dataset()
            )
        return {name: float(values[0]) for name, values in statistics_of(seen.moves).items()}

    return run


PLAN = dpdl.PrivacyPlan(sample_rate=1.0, expected_batch_size=3, steps=2, noise_multiplier=2.0, max_grad_norm=1.0)


@pytest.mark.parametrize(("fault", "consistent"), [(CORRECT, True), (NO_CLIP, False), (SAME_KEY, False)])
def test_tiny_private_runs(fault: str, consistent: bool) -> None:
    found = audit_many_runs(run_of(PLAN, fault), runs=20, delta=DELTA, claimed_epsilon=2.0, curve="gaussian")
    assert PLAN.epsilon(DELTA) > 2.0
    assert found.consistent == consistent
    assert found.attack == "many runs"


@pytest.mark.slow
@pytest.mark.parametrize("fault", [CORRECT, HALVED, NO_CLIP, SAME_KEY])
def test_many_tiny_private_runs(fault: str) -> None:
    found = audit_many_runs(
        run_of(PLAN, fault), runs=300, delta=DELTA, claimed_epsilon=PLAN.epsilon(DELTA), curve="gaussian"
    )
    assert found.consistent == (fault == CORRECT)


def test_what_is_no_audit_is_refused() -> None:
    with pytest.raises(ParameterError, match="runs must be"):
        audit_many_runs(lambda present: 0.0, runs=3, delta=DELTA)
    with pytest.raises(ParameterError, match="with NaN"):
        audit_many_runs(lambda present: math.nan, runs=20, delta=DELTA)
    with pytest.raises(ParameterError, match="same scores"):
        audit_many_runs(lambda present: {str(present): 0.0}, runs=20, delta=DELTA)
    for wrong in ({"delta": 0.0}, {"confidence": 0.0}, {"curve": "gauss"}):
        with pytest.raises(ParameterError):
            simulated(1.0, **wrong)
