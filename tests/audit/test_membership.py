"""Loss-threshold attacks: rates against loops and closed forms, what is found, and when no epsilon is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from accountants import NeighboringRelation
from dpdl.audit.coin_game import CoinGame
from dpdl.audit.membership import loss_threshold_attack, losses_of
from dpdl.audit.membership_result import MembershipResult
from dpdl.errors import ParameterError

NORMAL = NormalDist()


def result(members: Any, non_members: Any, **more: Any) -> MembershipResult:
    return MembershipResult(attack="test", members=np.asarray(members), non_members=np.asarray(non_members), **more)


def gaussian(shift: float, count: int, seed: int = 0) -> MembershipResult:
    generator = np.random.default_rng(seed)
    return result(generator.normal(shift, 1, count), generator.normal(0, 1, count))


# --- rates -----------------------------------------------------------------------------------------------------------


def roc_by_loop(members: list[float], non_members: list[float]) -> set[tuple[float, float]]:
    points = {(0.0, 0.0)}
    for threshold in {*members, *non_members}:
        tpr = sum(score >= threshold for score in members) / len(members)
        points.add((sum(score >= threshold for score in non_members) / len(non_members), tpr))
    return points


@pytest.mark.parametrize("levels", [2, 7, 10**6])
def test_the_roc_is_that_of_all_thresholds_one_by_one(levels: int) -> None:
    generator = np.random.default_rng(levels)
    members, others = generator.integers(levels, size=30) + 0.0, generator.integers(levels, size=41) + 0.0
    found = result(members, others)
    assert set(zip(*(rates.tolist() for rates in found.roc()), strict=True)) == roc_by_loop(
        members.tolist(), others.tolist()
    )
    pairs = [1.0 if m > o else 0.5 if m == o else 0.0 for m in members for o in others]
    assert found.auc == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


@pytest.mark.parametrize("levels", [3, 10**6])
@pytest.mark.parametrize("allowed", [0.0, 0.01, 0.1, 0.25, 1.0])
def test_true_positives_are_the_most_that_any_threshold_within_the_rate_finds(levels: int, allowed: float) -> None:
    generator = np.random.default_rng(levels)
    members, others = generator.integers(levels, size=60) + 3.0, generator.integers(levels, size=40) + 0.0
    rate = result(members, others).tpr_at(allowed)
    best = max(tpr for fpr, tpr in roc_by_loop(members.tolist(), others.tolist()) if fpr <= allowed)
    assert rate.tpr == pytest.approx(best, abs=1e-12)
    assert rate.fpr <= allowed
    assert rate.lower <= rate.tpr <= rate.upper


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_shifted_normal_scores_have_the_rates_of_the_closed_form(shift: float) -> None:
    found = gaussian(shift, 200_000)
    assert found.auc == pytest.approx(NORMAL.cdf(shift / math.sqrt(2)), abs=0.004)
    assert found.advantage == pytest.approx(2 * NORMAL.cdf(shift / 2) - 1, abs=0.01)
    for rate in (1e-3, 1e-2):
        expected = NORMAL.cdf(NORMAL.inv_cdf(rate) + shift)
        assert found.tpr_at(rate).tpr == pytest.approx(expected, rel=0.12)
        # a scale that is 15% off is another curve, and is told from this one
        wrong = NORMAL.cdf(NORMAL.inv_cdf(rate) + shift * 1.15)
        assert shift < 1 or found.tpr_at(rate).tpr != pytest.approx(wrong, rel=0.12)


def test_the_interval_covers_the_rate_at_its_threshold_as_often_as_it_says() -> None:
    """Of 400 experiments at 90% about 360 cover; a threshold in the members' own sample would be another matter."""
    covered = narrow = 0
    for seed in range(400):
        found = gaussian(1.0, 300, seed)
        rate = MembershipResult(
            attack="test", members=found.members, non_members=found.non_members, confidence=0.9
        ).tpr_at(0.05)
        threshold = np.sort(found.non_members)[::-1][15]
        truth = 1 - NORMAL.cdf(float(threshold) - 1.0)
        covered += rate.lower <= truth <= rate.upper
        middle, half = rate.tpr, (rate.upper - rate.lower) / 2
        narrow += middle - half / 3 <= truth <= middle + half / 3
    assert 350 <= covered <= 390
    assert narrow < 250  # intervals of a third of the width do not cover so often


def test_the_advantage_of_scores_that_know_nothing_is_around_zero_in_small_samples_too() -> None:
    """The best threshold of all scores would show 15% here, at chance."""
    advantages = [gaussian(0.0, 40, seed).advantage for seed in range(200)]
    assert abs(float(np.mean(advantages))) < 0.02
    best = [max(tpr - fpr for fpr, tpr in zip(*gaussian(0.0, 40, seed).roc(), strict=True)) for seed in range(200)]
    assert float(np.mean(best)) > 0.1


# --- epsilon ---------------------------------------------------------------------------------------------------------


def test_scores_without_coins_give_no_epsilon_and_say_why() -> None:
    found = gaussian(5.0, 100)
    with pytest.raises(ParameterError, match=r"bound no epsilon.*one trial"):
        found.to_audit(delta=1e-5)
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    given = loss_threshold_attack(nn.Linear(3, 2), members=(x[:10], y[:10]), non_members=(x[10:], y[10:]))
    with pytest.raises(ParameterError, match='split="random"'):
        given.to_audit(delta=1e-5)


def randomised_response(epsilon: float, count: int, generator: np.random.Generator) -> CoinGame:
    """Each coin is released through randomised response: the best guess is right with e^eps / (1 + e^eps)."""
    coins = generator.random(count) < 0.5
    kept = generator.random(count) < math.exp(epsilon) / (1 + math.exp(epsilon))
    scores = np.where(coins == kept, 1.0, -1.0) + 0.01 * generator.random(count)
    return CoinGame(scores=scores, coins=coins, relation=NeighboringRelation.ADD_OR_REMOVE)


def test_the_bound_of_a_coin_game_is_below_the_truth_as_often_as_it_says_and_not_far_below() -> None:
    """Randomised response has epsilon 1.5 exactly: bounds are above it in about 10% of games at most."""
    generator = np.random.default_rng(0)
    lower = [
        randomised_response(1.5, 400, generator).audit(attack="test", delta=1e-9, confidence=0.9).epsilon_lower
        for _ in range(200)
    ]
    wrong = sum(value > 1.5 for value in lower)
    assert wrong <= 33  # 20 expected, standard deviation 4.2
    assert float(np.median(lower)) > 1.1
    # Were the mechanism's epsilon 1.1, as many as that would be above it: the test can fail.
    assert sum(value > 1.1 for value in lower) > 80


# --- models ----------------------------------------------------------------------------------------------------------

Trained = Callable[[Tensor, Tensor], nn.Module]


def noise_labels(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels that nothing in the inputs tells: whoever fits them has learned them by heart."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 20, generator=generator), torch.randint(10, (count,), generator=generator)


def overfitted(x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def private(x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
    loader = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)
    plan = dpdl.PrivacyPlan.for_loader(loader, epochs=5, epsilon=1.0, delta=1e-4, max_grad_norm=1.0)
    model, optimizer, private_loader = dpdl.make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.2), loader, plan
    )
    for inputs, labels in private_loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def attacked(train: Trained, **more: Any) -> MembershipResult:
    x, y = noise_labels(600, seed=1)
    model = train(x[:300], y[:300])
    return loss_threshold_attack(model, members=(x[:300], y[:300]), non_members=(x[300:], y[300:]), **more)


def test_a_model_that_learned_by_heart_is_found_out_and_its_epsilon_refuted() -> None:
    found = attacked(overfitted, split="random", seed=2)
    # A tenth of the non-members is fitted too, by luck.
    assert found.auc > 0.9
    assert found.tpr_at(0.01).lower > 0.02  # chance is 0.01
    audit = found.to_audit(delta=1e-5, claimed_epsilon=0.5)
    assert audit.epsilon_lower > 1
    assert not audit.consistent
    assert "replacing" in str(audit.assumptions)


def test_a_private_model_shows_nothing_and_its_claim_survives() -> None:
    found = attacked(private, split="random", seed=2)
    assert abs(found.auc - 0.5) < 0.1
    assert found.tpr_at(0.01).lower < 0.02
    # With probability 0.999 over coins and training, whatever they are: the claim is proven.
    assert found.to_audit(delta=1e-4, claimed_epsilon=3.0, confidence=0.999).consistent


def test_difficulty_calibration_sees_what_losses_alone_do_not() -> None:
    """Losses that are mostly difficulty: example i has loss d_i, less 0.1 if it was trained on."""
    generator = torch.Generator().manual_seed(0)
    difficulty = 5 * torch.rand(400, generator=generator)
    member = torch.arange(400) < 200
    x, y = torch.stack([difficulty, member.float()], dim=1), torch.zeros(400)

    class Model(nn.Module):
        def __init__(self, gain: float) -> None:
            super().__init__()
            self.gain = gain

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs[:, 0] - self.gain * inputs[:, 1]

    def attack(**more: Any) -> MembershipResult:
        return loss_threshold_attack(
            Model(0.1),
            members=(x[:200], y[:200]),
            non_members=(x[200:], y[200:]),
            loss_fn=lambda outputs, _: outputs,
            **more,
        )

    assert attack().auc < 0.6
    assert attack(references=[Model(0.0), Model(0.0)]).auc == 1
    assert attack(references=[Model(0.0)]).attack == "loss threshold, calibrated"


def test_the_model_is_left_in_the_modes_that_it_was_in_and_evaluated_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    model.train()
    model[2].eval()
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    first, second = losses_of(model, x, y), losses_of(model, x, y, rows=3)
    np.testing.assert_allclose(first, second, rtol=1e-6)
    assert [module.training for module in model.modules()] == [True, True, True, False, False]


def test_infinite_losses_are_ordered_and_nan_is_refused() -> None:
    x, y = torch.ones(3, 1), torch.zeros(3)
    infinite = losses_of(nn.Identity(), x, y, loss_fn=lambda outputs, _: outputs[:, 0] / 0)
    assert np.isfinite(infinite).all()
    with pytest.raises(ParameterError, match="NaN"):
        losses_of(nn.Identity(), x, y, loss_fn=lambda outputs, _: outputs[:, 0] * math.nan)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"split": "maybe"}, "split must be one of"),
        ({"non_members": (torch.zeros(3, 2), torch.zeros(2).long())}, "non_members.*got 3 and 2"),
        ({"loss_fn": lambda outputs, labels: F.cross_entropy(outputs, labels)}, 'Use reduction="none"'),
        ({"split": "random", "non_members": (torch.zeros(3, 2), torch.zeros(3).long())}, "at least 4"),
        ({"confidence": 1.0}, "confidence must be in"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], says: str) -> None:
    rows = (torch.zeros(5, 2), torch.zeros(5).long())
    with pytest.raises(ParameterError, match=says):
        loss_threshold_attack(nn.Linear(2, 2), **{"members": rows, "non_members": rows, **wrong})


def test_the_sentence_and_the_dict_say_the_rates_and_that_a_failure_proves_nothing() -> None:
    found = gaussian(1.0, 1000)
    assert "at a false positive rate of 0.001" in str(found)
    assert "proves nothing" in str(found)
    values = found.to_dict()
    assert values["schema"] == "dpdl.membership/1"
    assert [rate["allowed"] for rate in values["tpr_at_fpr"]] == [0.001, 0.01]
    assert values["auc"] == found.auc
