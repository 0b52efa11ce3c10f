"""The test that users put in their own CI: right code passes, every planted fault fails it, and it says what it saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import dpdl
from dpdl.audit.assertion import AuditFailure, assert_private, least_visible_leak
from dpdl.errors import ParameterError, StepError
from tests.audit.planted import CORRECT, FAULTS, HALVED, NO_CLIP, REUSED, SAME_KEY, SHUFFLED, trainer

DELTA = 1e-5
FULL = dpdl.PrivacyPlan(sample_rate=1.0, expected_batch_size=1, steps=3, noise_multiplier=3.0, max_grad_norm=1.0)
HALF = dpdl.PrivacyPlan(sample_rate=0.5, expected_batch_size=1, steps=4, noise_multiplier=1.0, max_grad_norm=1.0)
QUARTER = dpdl.PrivacyPlan(sample_rate=0.25, expected_batch_size=1, steps=4, noise_multiplier=0.5, max_grad_norm=1.0)


def audited(under: dpdl.PrivacyPlan, fault: str, **settings: Any) -> Any:
    given: dict[str, Any] = {"epsilon": under.epsilon(DELTA), "delta": DELTA, "insecure_seed": 1}
    return assert_private(trainer(under, fault=fault), **{**given, **settings})


@pytest.mark.parametrize("plan", [FULL, HALF])
def test_right_code_passes_and_is_told_what_would_have_been_seen(plan: dpdl.PrivacyPlan) -> None:
    found = audited(plan, CORRECT, canaries=4000)
    assert found.consistent
    assert found.epsilon_lower > 0
    assert "4000 canaries in each of 2 runs: noise of" in found.notes[0]
    assert "give the plan" in found.notes[0]


@pytest.mark.parametrize(
    ("fault", "plan", "statistic"),
    [
        (HALVED, FULL, ("sum", "soft maximum", "largest")),
        (HALVED, HALF, ("sum", "soft maximum", "largest")),
        (NO_CLIP, FULL, ("sum", "soft maximum", "largest", "range")),
        (REUSED, HALF, ("range",)),
        (SAME_KEY, FULL, ("difference of runs",)),
    ],
)
def test_a_planted_fault_is_caught_and_named(fault: str, plan: dpdl.PrivacyPlan, statistic: tuple[str, ...]) -> None:
    with pytest.raises(AuditFailure, match=r"epsilon >= .* above the claim of .* Where to look: ") as caught:
        audited(plan, fault)
    assert isinstance(caught.value, AssertionError)
    assert not caught.value.result.consistent
    assert caught.value.result.details["statistic"] in statistic


@pytest.mark.slow
def test_shuffled_batches_are_caught_by_the_plans_whole_curve() -> None:
    assert audited(QUARTER, CORRECT, plan=QUARTER, canaries=8000).consistent
    with pytest.raises(AuditFailure, match="batches drawn otherwise than claimed"):
        audited(QUARTER, SHUFFLED, plan=QUARTER, canaries=8000)


def test_all_planted_faults_are_tried_here_or_in_the_audit_of_one_run() -> None:
    assert set(FAULTS) == {CORRECT, HALVED, NO_CLIP, SHUFFLED, REUSED, SAME_KEY}


def by_hand(*, noise: float, clip: bool = True) -> Any:
    """DP-SGD as somebody writes it without the library: one step on everything, noise multiplier 1."""

    def train(model: nn.Module, dataset: Any) -> None:
        (x, y), *_ = DataLoader(dataset, batch_size=len(dataset))
        (p,) = model.parameters()
        total = torch.zeros_like(p)
        optimizer = torch.optim.Adam([p], lr=0.1) if noise == 0 else torch.optim.SGD([p], lr=0.1)
        for one, label in zip(x, y, strict=True):
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(one[None]), label[None]), [p])
            total += gradient * min(1.0, 1 / max(float(gradient.norm()), 1e-12)) if clip else gradient
        p.grad = total + noise * torch.randn_like(total)
        optimizer.step()

    return train


def test_training_without_the_library_is_audited_too() -> None:
    torch.manual_seed(0)
    claim: dict[str, Any] = {"epsilon": 4.378, "delta": DELTA, "canaries": 200, "insecure_seed": 0}
    assert assert_private(by_hand(noise=1.0), **claim).consistent
    for wrong in (by_hand(noise=0.25), by_hand(noise=1.0, clip=False), by_hand(noise=0.0)):
        with pytest.raises(AuditFailure):
            assert_private(wrong, **claim)


def test_the_power_that_is_stated_is_there() -> None:
    """Noise of what is called visible is seen in most simulated audits, and the claimed noise in none."""
    leak = least_visible_leak(epsilon=4.378, delta=DELTA, trials=500, confidence=0.999)
    assert 1.2 < leak < 2.5
    torch.manual_seed(1)

    def gaussian(noise: float) -> Any:
        def train(model: nn.Module, dataset: Any) -> None:
            (p,) = model.parameters()
            p.grad = noise * torch.randn_like(p)
            p.grad[:-1][model.coins] -= 1.0
            torch.optim.SGD([p], lr=1.0).step()

        return train

    claim: dict[str, Any] = {"epsilon": 4.378, "delta": DELTA, "canaries": 1000}
    caught = 0
    for _ in range(8):
        assert assert_private(gaussian(1.0), **claim).consistent
        try:
            assert_private(gaussian(1 / leak), **claim)
        except AuditFailure:
            caught += 1
    assert caught >= 5


def test_audits_that_could_show_nothing_are_refused_before_training() -> None:
    def never(model: nn.Module, dataset: Any) -> None:
        raise AssertionError("trained")

    for wrong in ({"epsilon": 40.0}, {"canaries": 8}, {"runs": 0}, {"delta": 0.1}, {"epsilon": -1.0}):
        with pytest.raises(ParameterError):
            assert_private(never, **{"epsilon": 1.0, "delta": DELTA, **wrong})  # type: ignore[arg-type]
    with pytest.raises(StepError, match="very model"):
        assert_private(lambda model, dataset: None, epsilon=1.0, delta=DELTA)
