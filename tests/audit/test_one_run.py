"""Audits of one run, through make_private: what holds what it claims passes, what is broken is caught."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from dpdl.audit.canaries import Canaries, mislabelled
from dpdl.audit.gradient_canaries import GradientCanaries
from dpdl.audit.one_run import audit_gradients, audit_one_run, bound_from_scores
from dpdl.audit.result import AuditResult
from dpdl.errors import ParameterError
from tests.audit.planted import CORRECT, HALVED, NO_CLIP, SHUFFLED, trainer

DELTA = 1e-5
FULL = dpdl.PrivacyPlan(sample_rate=1.0, expected_batch_size=1, steps=2, noise_multiplier=2.0, max_grad_norm=1.0)
SAMPLED = dpdl.PrivacyPlan(sample_rate=0.25, expected_batch_size=1, steps=4, noise_multiplier=0.5, max_grad_norm=1.0)


def data(n: int = 100) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 10, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


def white_box(plan: dpdl.PrivacyPlan, fault: str, /, *, count: int, **audit: Any) -> AuditResult:
    canaries = GradientCanaries(nn.Linear(10, 2), count=count, insecure_seed=5)
    train = trainer(plan, fault=fault, insecure_seed=7)
    settings: dict[str, Any] = {"delta": DELTA, "claimed_epsilon": plan.epsilon(DELTA), "curve": "gaussian"}
    return audit_gradients(train, canaries, dataset=data(), **{**settings, **audit})


@pytest.mark.parametrize(("curve", "count"), [("any", 3000), ("gaussian", 3000)])
def test_a_correct_run_passes_in_white_box(curve: Any, count: int) -> None:
    found = white_box(FULL, CORRECT, count=count, curve=curve)
    assert found.consistent
    assert found.epsilon_lower > 0.5  # and something is seen
    assert found.attack == "one run, white box"
    assert found.details["canaries"] == count
    assert any("Gaussian" in assumption for assumption in found.assumptions) == (curve == "gaussian")


@pytest.mark.parametrize(("fault", "curve"), [(HALVED, "gaussian"), (NO_CLIP, "any")])
def test_a_broken_run_is_caught_by_one_run(fault: str, curve: Any) -> None:
    assert not white_box(FULL, fault, count=6000, curve=curve).consistent


@pytest.mark.parametrize("fault", [HALVED, NO_CLIP])
def test_with_canaries_as_runs_fewer_do(fault: str) -> None:
    assert white_box(FULL, CORRECT, count=1000, independent=True).consistent
    found = white_box(FULL, fault, count=1000, independent=True)
    assert not found.consistent
    assert any("independent of what happened to another" in each for each in found.assumptions)


@pytest.mark.parametrize("independent", [True, False])
def test_a_claim_comes_with_what_would_have_been_seen(independent: bool) -> None:
    (note,) = white_box(SAMPLED, CORRECT, count=1000, independent=independent, plan=SAMPLED).notes
    assert note.startswith("1000 canaries: ")
    assert "with probability 90%" in note
    assert "give the plan" not in note
    (note,) = white_box(SAMPLED, CORRECT, count=1000, independent=independent).notes
    assert "give the plan" in note
    assert white_box(SAMPLED, CORRECT, count=100, independent=independent, claimed_epsilon=None).notes == ()


def test_shuffled_batches_are_told_from_poisson_batches() -> None:
    """Asked at a large delta: of four shuffled batches one has everybody, of four Poisson draws (3/4)^4 miss one."""
    delta = 0.41
    claim = SAMPLED.epsilon(delta)
    assert claim == 0  # in total variation, then
    asked: dict[str, Any] = {"delta": delta, "claimed_epsilon": claim, "curve": "any", "independent": True}
    assert white_box(SAMPLED, CORRECT, count=8000, **asked).consistent
    found = white_box(SAMPLED, SHUFFLED, count=8000, **asked)
    assert not found.consistent
    assert found.details["statistic"] in ("largest", "soft maximum")


# ── black box ───────────────────────────────────────────────────────────────────────────────────────


def black_box(train: Any, *, count: int, claimed: float | None = None) -> AuditResult:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 200, generator=generator)
    y = (x[:, 0] > 0).long()
    canaries = Canaries.with_fair_coins(*mislabelled(x, y, classes=2), insecure_seed=3)
    private = TensorDataset(torch.randn(20, 200, generator=generator), torch.randint(2, (20,), generator=generator))

    def score(model: nn.Module, examples: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            return -F.cross_entropy(model(examples), labels, reduction="none")

    return audit_one_run(train, canaries, score, dataset=private, delta=DELTA, claimed_epsilon=claimed)


def test_training_that_learns_its_examples_by_heart_is_seen_in_black_box() -> None:
    def train(dataset: Any) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(200, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        (x, y), *_ = DataLoader(dataset, batch_size=len(dataset))
        for _ in range(200):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model

    found = black_box(train, count=300, claimed=1.0)
    assert found.attack == "one run, black box"
    assert not found.consistent


def test_private_training_is_not() -> None:
    plan = replace(FULL, noise_multiplier=1.0)

    def train(dataset: Any) -> nn.Module:
        model = nn.Linear(200, 2)
        trainer(plan, lr=1.0, insecure_seed=2)(model, dataset)
        return model

    assert black_box(train, count=300, claimed=plan.epsilon(DELTA)).consistent


# ── scores ──────────────────────────────────────────────────────────────────────────────────────────


def scored(mu: float, *, m: int = 400, seed: int = 0, **settings: Any) -> AuditResult:
    generator = np.random.default_rng(seed)
    coins = generator.random(m) < 0.5
    given: dict[str, Any] = {"attack": "simulated", "delta": DELTA, "confidence": 0.9}
    return bound_from_scores(
        {"good": generator.standard_normal(m) + mu * coins, "bad": generator.standard_normal(m)},
        coins, **{**given, **settings},
    )  # fmt: skip


@pytest.mark.parametrize("curve", ["any", "gaussian"])
def test_bounds_cover_though_several_tests_are_tried(curve: Any) -> None:
    truth = 4.377  # of mu = 1
    assert sum(scored(1.0, seed=seed, curve=curve).epsilon_lower > truth for seed in range(20)) <= 2
    assert sum(scored(0.0, seed=seed, curve=curve).epsilon_lower > 0 for seed in range(20)) <= 2
    assert sum(scored(6.0, seed=seed, curve="gaussian").epsilon_lower > truth for seed in range(5)) == 5


def test_bad_scores_are_refused() -> None:
    coins = np.array([True, False])
    good: dict[str, Any] = {"attack": "x", "delta": DELTA, "confidence": 0.9}
    with pytest.raises(ParameterError, match="with NaN"):
        bound_from_scores({"a": np.array([0.0, np.nan])}, coins, **good)
    with pytest.raises(ParameterError, match="one a canary"):
        bound_from_scores({"a": np.zeros(3)}, coins, **good)
    for wrong in ({"confidence": 1.0}, {"delta": 0.0}, {"curve": "other"}):
        with pytest.raises(ParameterError):
            bound_from_scores({"a": np.zeros(2)}, coins, **{**good, **wrong})
