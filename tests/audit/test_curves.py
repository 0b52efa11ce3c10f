"""Audits against a plan's own curve: right code is hardly ever refuted, and what is found of it is not far below.

Scores are simulated as the plan has it, without the library: for each step a coin of the sampling rate, and noise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

import dpdl
from dpdl.audit.curves import Curve, PlanCurves
from dpdl.audit.many_runs import bound_from_runs
from dpdl.audit.result import AuditResult

DELTA = 1e-5
STEPS, RATE, NOISE = 16, 0.25, 1.0
PLAN = dpdl.PrivacyPlan(sample_rate=RATE, expected_batch_size=1, steps=STEPS, noise_multiplier=NOISE, max_grad_norm=1.0)
CLAIM = PLAN.epsilon(DELTA)


def sums(rng: np.random.Generator, n: int, *, noise: float, rate: float) -> NDArray[np.float64]:
    took_part = rng.binomial(STEPS, rate, n).astype(float)
    return np.asarray(took_part + noise * STEPS**0.5 * rng.standard_normal(n))


def audit(seed: int, *, n: int, noise: float = NOISE, confidence: float = 0.95) -> AuditResult:
    rng = np.random.default_rng(seed)
    with_it, without = (_scores(sums(rng, n, noise=noise, rate=rate), rng) for rate in (RATE, 0.0))
    return bound_from_runs(with_it, without, delta=DELTA, confidence=confidence, claimed_epsilon=CLAIM, curve=PLAN)


def _scores(seen: NDArray[np.float64], rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    """What was seen, and worse statistics: the more there are, the more a choice among them must be paid for."""
    worse = {f"worse {k}": seen + k * rng.standard_normal(len(seen)) for k in range(1, 6)}
    return {"sum": seen, **worse}


def test_right_code_is_refuted_at_most_as_often_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With so few runs and so little confidence, a test chosen on the runs that are counted would be refuted often."""

    def at_the_claim(family: PlanCurves, refuted: Callable[[Curve], bool], *, above: float) -> float:
        """Enough to know whether it is an alarm; how much is found beyond it costs the accountant many curves."""
        return 2 / NOISE if refuted(family.curve(1 / NOISE)) else above

    monkeypatch.setattr(PlanCurves, "strongest", at_the_claim)
    alarms = [not audit(seed, n=40, confidence=0.5).consistent for seed in range(40)]
    assert sum(alarms) <= 6, "20 are allowed; but both limits seldom fail together"


def test_what_is_found_of_right_code_comes_near_its_claim() -> None:
    """A test chosen at the claimed curve, beyond which nothing of right code is, finds little."""
    found = [audit(seed, n=4000).epsilon_lower for seed in range(5)]
    assert all(bound <= CLAIM for bound in found)
    assert np.median(found) > 0.55 * CLAIM


def test_half_of_the_noise_is_found_and_most_of_its_epsilon() -> None:
    found = [audit(seed, n=4000, noise=NOISE / 2) for seed in range(5)]
    assert not any(each.consistent for each in found)
    assert np.median([each.epsilon_lower for each in found]) > 1.4 * CLAIM
