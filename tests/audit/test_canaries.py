"""Canaries: their coins, what a run gets of them, and the gradients of those that are directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from dpdl.audit.canaries import Canaries, fair_coins, mislabelled
from dpdl.audit.gradient_canaries import DirectionsOnly, GradientCanaries
from dpdl.audit.transcript import Transcript, statistics_of
from dpdl.errors import ParameterError, StepError
from tests.audit.planted import trainer


def test_coins_are_fair_and_leave_torch_generators_alone() -> None:
    state = torch.get_rng_state()
    coins = fair_coins(100_000, insecure_seed=1)
    assert coins.dtype == torch.bool
    assert abs(float(coins.double().mean()) - 0.5) < 5 * 0.5 / 100_000**0.5
    assert abs(float((coins[1:] == coins[:-1]).double().mean()) - 0.5) < 5 * 0.5 / 100_000**0.5
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(fair_coins(1000), fair_coins(1000))
    assert torch.equal(fair_coins(1000, insecure_seed=3), fair_coins(1000, insecure_seed=3))


def test_only_included_canaries_join_the_data() -> None:
    canaries = Canaries(
        examples=torch.arange(4.0).reshape(4, 1), labels=torch.tensor([0, 1, 0, 1]),
        coins=torch.tensor([True, False, False, True]),
    )  # fmt: skip
    joined = canaries.joined(TensorDataset(torch.full((3, 1), 9.0), torch.zeros(3, dtype=torch.long)))
    assert [float(joined[i][0]) for i in range(5)] == [9.0, 9.0, 9.0, 0.0, 3.0]
    assert len(canaries) == 4
    assert len(canaries.included) == 2


def test_all_mislabelled_examples_have_a_wrong_label() -> None:
    labels = torch.arange(100) % 10
    _, wrong = mislabelled(torch.zeros(100, 2), labels, classes=10)
    assert not bool((wrong == labels).any())
    assert len(set((wrong - labels).remainder(10).tolist())) == 9
    with pytest.raises(ParameterError):
        mislabelled(torch.zeros(100, 2), labels, classes=1)
    with pytest.raises(ParameterError):
        mislabelled(torch.zeros(100, 2), labels.double(), classes=10)


@pytest.mark.parametrize("change", [{"coins": torch.ones(2, dtype=torch.bool)}, {"labels": torch.zeros(2)}])
def test_canaries_that_do_not_fit_are_refused(change: dict[str, Tensor]) -> None:
    given = {"examples": torch.zeros(3, 1), "labels": torch.zeros(3), "coins": torch.ones(3, dtype=torch.bool)}
    with pytest.raises(ParameterError):
        Canaries(**{**given, **change})


# ── directions ──────────────────────────────────────────────────────────────────────────────────────


def image_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10))


@pytest.mark.parametrize("engine", ["loop", "vmap", "tape"])
def test_each_canary_has_a_direction_of_its_own_and_private_examples_have_the_models(engine: Any) -> None:
    torch.manual_seed(0)
    model = GradientCanaries(image_net(), count=6, insecure_seed=0)
    x, k = torch.randn(5, 1, 8, 8), torch.tensor([-1, 4, -1, 0, 6])  # 6: one that stays out
    y = torch.tensor([3, 0, 7, 0, 0])
    given: Any = ((x, k),)
    gradients = dpdl.per_sample_gradients(model, F.cross_entropy, given, y, engine=engine)
    plain = dpdl.per_sample_gradients(model.model, F.cross_entropy, x[[0, 2]], y[[0, 2]], engine="loop")
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[f"model.{name}"][[0, 2]], gradient)
        assert not gradients[f"model.{name}"][[1, 3, 4]].any()
    table = gradients["directions.weight"].squeeze(2)
    expected = torch.zeros(5, 7)
    expected[1, 4] = expected[3, 0] = -0.9 * model.slope  # softmax of ten zeros, minus 1
    torch.testing.assert_close(table, expected)


def test_outputs_on_private_examples_are_the_models_own() -> None:
    net = image_net()
    model, x = GradientCanaries(net, count=3), torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(model((x, torch.full((4,), -1))), net(x))
    assert not model((x, torch.zeros(4, dtype=torch.long))).any()


def test_the_number_of_examples_does_not_depend_on_coins() -> None:
    data = TensorDataset(torch.randn(10, 1, 8, 8), torch.arange(10))
    for seed in range(3):
        model = GradientCanaries(image_net(), count=20, insecure_seed=seed)
        joined = model.joined(data)
        assert len(joined) == 30  # type: ignore[arg-type]
        (x, k), y = next(iter(DataLoader(joined, batch_size=30)))
        assert x.shape == (30, 1, 8, 8)
        assert k[:10].tolist() == [-1] * 10
        assert [i for i in range(20) if k[10 + i] == i] == model.coins.nonzero().flatten().tolist()
        assert set(k[10:][~model.coins].tolist()) <= {20}
        assert y.tolist() == [*range(10), *[0] * 20]
        assert len(DirectionsOnly(count=20, insecure_seed=seed).dataset()) == 20


def test_regression_has_directions_too() -> None:
    model = DirectionsOnly(count=3, outputs=1, label=1.0)
    F.mse_loss(model(torch.tensor([1])), torch.tensor([[1.0]])).backward()
    assert model.watched.grad is not None
    assert model.watched.grad.flatten().tolist() == [0.0, -2 * model.slope, 0.0, 0.0]
    with pytest.raises(ParameterError):
        GradientCanaries(image_net(), count=3, slope=0.0)


# ── transcripts ─────────────────────────────────────────────────────────────────────────────────────


def test_a_transcript_sees_each_step_of_any_optimizer_once() -> None:
    w, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    with Transcript([w]) as seen:
        for value in (1.0, 2.0):
            optimizer = torch.optim.SGD([w], lr=0.5)
            w.grad = torch.tensor([value, 0.0])
            optimizer.step()
        other.grad = torch.ones(1)
        torch.optim.SGD([other], lr=1.0).step()
    w.grad = torch.ones(2)
    torch.optim.SGD([w], lr=1.0).step()  # it is over
    assert seen.moves.tolist() == [[-0.5, 0.0], [-1.0, 0.0]]


def test_a_private_step_is_seen_once_though_two_optimizers_take_it() -> None:
    model = DirectionsOnly(count=4)
    plan = dpdl.PrivacyPlan(sample_rate=1.0, expected_batch_size=4, steps=3, noise_multiplier=1.0, max_grad_norm=1.0)
    with Transcript([model.watched]) as seen:
        trainer(plan)(model, model.dataset())
    assert seen.moves.shape == (3, 5)


def test_a_copy_is_not_seen_and_that_is_said() -> None:
    w = nn.Parameter(torch.zeros(2))
    with Transcript([w]) as seen:
        copy = nn.Parameter(w.detach().clone())
        copy.grad = torch.ones(2)
        torch.optim.SGD([copy], lr=1.0).step()
    with pytest.raises(StepError, match="very model"):
        _ = seen.moves


def test_statistics_of_moves() -> None:
    found = statistics_of(torch.tensor([[1.0, 0.0], [3.0, -1.0]]).double().numpy())
    assert found["sum"].tolist() == [4.0, -1.0]
    assert found["largest"].tolist() == [3.0, 0.0]
    assert found["range"].tolist() == [2.0, 1.0]
    assert found["soft maximum"][0] > found["soft maximum"][1]
