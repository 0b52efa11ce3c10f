"""LiRA: against closed forms and loops, what it finds and what not, and that its bound holds as often as it says."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from accountants import Gaussian
from dpdl.audit.likelihood_ratio import lira
from dpdl.audit.membership_result import MembershipResult
from dpdl.audit.roc_plot import plot_roc
from dpdl.audit.shadow_models import ShadowModels, logit_confidence, train_shadow_models
from dpdl.errors import ParameterError

NORMAL = NormalDist()


def simulated(
    models: int, examples: int, *, shift: float = 2.0, spread: float = 5.0, queries: int = 1, seed: int = 0
) -> ShadowModels:
    """Confidences as LiRA assumes them: an example's own level, more by `shift` with the example, unit noise."""
    generator = np.random.default_rng(seed)
    coins = generator.random((models, examples)) < 0.5
    levels = spread * generator.normal(size=examples)
    noise = generator.normal(size=(models, examples, queries))
    return ShadowModels(confidences=levels[None, :, None] + shift * coins[:, :, None] + noise, members=coins)


@pytest.mark.parametrize(
    ("variant", "variance"), [("online", "global"), ("online", "per_example"), ("offline", "auto")]
)
def test_with_many_models_the_attack_is_the_best_test_between_two_normals(variant: Any, variance: Any) -> None:
    """Neyman and Pearson: TPR = Phi(Phi^-1(FPR) + shift), for whoever knows each example's level."""
    found = lira(simulated(120, 1000), variant=variant, variance=variance)
    slack = 0.12 if variance == "global" else 0.35  # the variance of 60 numbers is noisy, which costs power
    for rate in (1e-3, 1e-2):
        best = NORMAL.cdf(NORMAL.inv_cdf(rate) + 2.0)
        assert found.tpr_at(rate).tpr == pytest.approx(best, rel=slack)
        wrong = NORMAL.cdf(NORMAL.inv_cdf(rate) + 2.0 * 1.4)
        assert found.tpr_at(rate).tpr < 0.8 * wrong  # a shift that is 40% off is told
    assert found.auc == pytest.approx(NORMAL.cdf(2.0 / math.sqrt(2)), abs=0.01)


def test_one_threshold_for_all_examples_finds_far_less_where_levels_differ() -> None:
    shadows = simulated(40, 1000)
    values = shadows.confidences[:, :, 0]
    one = MembershipResult(
        attack="one threshold", members=values[shadows.members], non_members=values[~shadows.members]
    )
    assert one.tpr_at(0.01).tpr < 0.05
    assert lira(shadows).tpr_at(0.01).tpr > 0.25


def test_more_queries_of_an_example_tell_more() -> None:
    """Independent noise in each of 4 queries: the shift is as if doubled."""
    found = lira(simulated(100, 600, queries=4, shift=1.0), variance="global")
    assert found.tpr_at(0.01).tpr == pytest.approx(NORMAL.cdf(NORMAL.inv_cdf(0.01) + 2.0), rel=0.15)


def by_loop(shadows: ShadowModels, target: int, example: int, *, global_std: tuple[float, float] | None) -> float:
    """The log-likelihood ratio of one pair, from the standard library's normal distribution."""
    others = [m for m in range(len(shadows.members)) if m != target]
    said = {
        kind: [float(shadows.confidences[m, example, 0]) for m in others if bool(shadows.members[m, example]) is kind]
        for kind in (True, False)
    }
    stds = global_std or (stdev(said[True]), stdev(said[False]))
    value = float(shadows.confidences[target, example, 0])
    with_it, without = (
        NormalDist(fmean(said[kind]), std).pdf(value) for kind, std in zip((True, False), stds, strict=True)
    )
    return math.log(with_it) - math.log(without)


def test_scores_are_the_ratios_of_a_loop_over_pairs() -> None:
    shadows = simulated(24, 5, seed=3)
    found = lira(shadows, variance="per_example")
    expected = {
        kind: sorted(
            by_loop(shadows, m, e, global_std=None)
            for m in range(24)
            for e in range(5)
            if bool(shadows.members[m, e]) is kind
        )
        for kind in (True, False)
    }
    np.testing.assert_allclose(np.sort(found.members), expected[True], rtol=1e-9)
    np.testing.assert_allclose(np.sort(found.non_members), expected[False], rtol=1e-9)


def test_examples_that_too_few_models_had_score_zero_and_are_counted() -> None:
    shadows = simulated(6, 50)
    coins = shadows.members.copy()
    coins[:, 0] = False
    found = lira(ShadowModels(confidences=shadows.confidences, members=coins))
    assert (np.concatenate([found.members, found.non_members]) == 0).sum() >= 6
    assert any("too few models" in note for note in found.notes)
    assert "too few" not in str(lira(simulated(60, 5)).notes)


# --- the bound -------------------------------------------------------------------------------------------------------


def released_sums(sigma: float, seed: int, *, copies: bool = False) -> ShadowModels:
    """Each run releases coin_i + N(0, sigma^2) for each candidate: a coin moves one number, by 1: Gaussian(sigma)."""
    generator = np.random.default_rng(seed)
    coins = generator.random((16, 400)) < 0.5
    if copies:
        coins[8:] = coins[:8]
    noise = sigma * generator.normal(size=(16, 400, 1))
    return ShadowModels(confidences=coins[:, :, None] + noise, members=coins)


def test_the_bound_holds_for_a_gaussian_and_refutes_a_quarter_of_its_noise() -> None:
    """Gaussian(1) has epsilon 4.38 at 1e-5; with a quarter of the noise it has 24, and the claim falls."""
    above = 0
    for seed in range(40):
        audit = lira(released_sums(1.0, seed)).to_audit(delta=1e-5, claimed_epsilon=4.378, confidence=0.9)
        above += not audit.consistent
        assert audit.epsilon_lower > 0.4
    assert above <= 4
    fallen = sum(
        not lira(released_sums(0.25, seed)).to_audit(delta=1e-5, claimed_epsilon=4.378, confidence=0.9).consistent
        for seed in range(10)
    )
    assert fallen >= 9


def test_runs_that_release_nothing_are_refuted_no_more_often_than_the_confidence_allows() -> None:
    generator = np.random.default_rng(0)
    above = 0
    for _ in range(60):
        coins = generator.random((12, 100)) < 0.5
        shadows = ShadowModels(confidences=generator.normal(size=(12, 100, 1)), members=coins)
        above += lira(shadows, targets=6).to_audit(delta=1e-9, confidence=0.9).epsilon_lower > 0
    assert above <= 13  # 6 expected, standard deviation 2.3


# --- models ----------------------------------------------------------------------------------------------------------


def task(count: int = 240) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 20, generator=generator), torch.randint(10, (count,), generator=generator)


def by_heart(x: Tensor, y: Tensor, number: int) -> nn.Module:
    torch.manual_seed(number)
    model = nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def privately(x: Tensor, y: Tensor, number: int) -> nn.Module:
    torch.manual_seed(number)
    model: nn.Module = nn.Linear(20, 10)
    # The rate is fixed beforehand; only what the sum is divided by follows the size, which a plan takes for public.
    plan = dpdl.PrivacyPlan(
        sample_rate=0.25, expected_batch_size=len(x) / 4, steps=12, noise_multiplier=1.0, max_grad_norm=1.0
    ).calibrated(epsilon=1.0, delta=1e-4)
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x) // 4, shuffle=True)
    model, optimizer, private_loader = dpdl.make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.5), loader, plan
    )
    for inputs, labels in private_loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def test_models_that_learn_by_heart_are_found_out() -> None:
    found = lira(train_shadow_models(by_heart, *task(), models=12, seed=0))
    assert found.tpr_at(0.01).lower > 0.2
    audit = found.to_audit(delta=1e-5, claimed_epsilon=1.0)
    assert not audit.consistent
    assert audit.details["canaries"] == 3 * 240


def test_private_models_show_nothing_and_their_claim_survives() -> None:
    found = lira(train_shadow_models(privately, *task(), models=8, seed=0))
    assert found.tpr_at(0.01).upper < 0.06
    assert abs(found.auc - 0.5) < 0.08
    assert found.to_audit(delta=1e-4, claimed_epsilon=1.0, confidence=0.999).consistent


@pytest.mark.slow
def test_several_processes_give_the_numbers_of_one() -> None:
    x, y = task(30)
    one = train_shadow_models(by_heart, x, y, models=4, seed=5, augmentations=[torch.neg])
    two = train_shadow_models(by_heart, x, y, models=4, seed=5, augmentations=[torch.neg], jobs=2)
    assert one.confidences.shape == (4, 30, 2)
    np.testing.assert_array_equal(one.members, two.members)
    np.testing.assert_allclose(one.confidences, two.confidences, atol=1e-3)


def test_coins_are_fair_and_another_model_has_other_ones() -> None:
    coins = train_shadow_models(lambda x, y, n: nn.Linear(20, 10), *task(), models=8).members
    assert abs(int(coins.sum()) - 960) < 4 * math.sqrt(8 * 240 / 4)
    assert len({row.tobytes() for row in coins}) == 8


def test_the_logit_of_a_confidence_is_exact_where_the_probability_rounds_to_one() -> None:
    logits = torch.tensor([[3.0, 1.0, -2.0], [0.5, 0.2, 0.1]], dtype=torch.float64)
    labels = torch.tensor([0, 2])
    p = logits.softmax(1)[torch.arange(2), labels]
    torch.testing.assert_close(logit_confidence(logits, labels), torch.log(p / (1 - p)))
    sure = logit_confidence(torch.tensor([[500.0, 0.0], [0.0, 500.0]]), torch.tensor([0, 0]))
    assert sure.tolist() == [500, -500]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"models": 3}, "at least 4"),
        ({"jobs": 0}, "jobs"),
        ({"jobs": 2}, "top of a module"),
    ],
)
def test_training_that_cannot_be_done_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        train_shadow_models(lambda x, y, n: nn.Linear(20, 10), *task(10), **wrong)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"variant": "both"}, "variant must be one of"),
        ({"variance": "none"}, "variance must be one of"),
        ({"targets": 4}, "must leave 3 of 6 models"),
        ({"targets": 0}, "targets"),
    ],
)
def test_attacks_that_cannot_be_made_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        lira(simulated(6, 10), **wrong)


def test_models_that_diverged_are_refused() -> None:
    shadows = simulated(6, 10)
    shadows.confidences[2, 3] = math.nan
    with pytest.raises(ParameterError, match="not finite"):
        ShadowModels(confidences=shadows.confidences, members=shadows.members)


def test_the_plot_is_written_with_the_bound_of_what_was_released(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = lira(simulated(8, 50))
    plot_roc([found], tmp_path / "roc.svg", event=Gaussian(0.5), title="two normals")
    text = (tmp_path / "roc.svg").read_text()
    assert text.count("<path") > 5
    with pytest.raises(ParameterError, match="cannot be written"):
        plot_roc([found], tmp_path / "roc.nonsense")
    with pytest.raises(ParameterError, match="no results"):
        plot_roc([], tmp_path / "roc.svg")
