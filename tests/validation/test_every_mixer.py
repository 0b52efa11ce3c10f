"""`dpdl.check` names the modules behind the first that mixes, too, and says where `dpdl.fix` would help."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dpdl
from dpdl.errors import LossError, ModelError
from dpdl.validation import fix
from tests.small_run import FEATURES, examples, same, weights_of
from tests.validation.mixers import (
    AttentionAcrossExamples,
    CentredOverBatch,
    InstanceNormThatTracks,
    ScaledByBatchMaximum,
    SoftmaxOverBatch,
)

X, Y = examples()


def named(model: nn.Module, x: object = X) -> list[str]:
    return [finding.module for finding in dpdl.check(model, x).findings if finding.kind == "mixes examples"]


class WithFlag(nn.Module):
    """Mixes, and takes its input by name beside something that is not a tensor."""

    def forward(self, *, values: Tensor, centre: bool) -> Tensor:
        return values - values.mean(0) if centre else values


class Chain(nn.Module):
    """Mixers one behind the other, some deep inside, honest modules between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)
        self.first = CentredOverBatch()
        self.honest = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Dropout(0.3), nn.LayerNorm(FEATURES))
        self.deep = nn.ModuleDict({"a": nn.Sequential(nn.Tanh(), SoftmaxOverBatch())})
        self.flagged, self.off = WithFlag(), WithFlag()
        self.rnn = nn.LSTM(FEATURES, FEATURES, batch_first=True)
        self.last = ScaledByBatchMaximum()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep["a"](self.honest(self.first(self.norm(x))))
        x = self.off(values=self.flagged(values=x, centre=True), centre=False)
        x = self.rnn(x.unsqueeze(1))[0].squeeze(1)
        return self.last(x)


def test_every_module_that_mixes_is_named_and_no_other() -> None:
    assert named(Chain()) == ["norm", "first", "deep.a.1", "flagged", "last"]


def test_without_batch_normalisation_the_first_culprit_hides_no_other() -> None:
    model = nn.Sequential(CentredOverBatch(), nn.Linear(FEATURES, FEATURES), AttentionAcrossExamples(), nn.Tanh())
    assert named(model.double()) == ["0", "2"]


class TimeFirst(nn.Module):
    """A recurrent layer whose time is as long as the batch that is tried, behind a mixer."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.mixer = CentredOverBatch()
        self.rnn = nn.LSTM(FEATURES, FEATURES)
        self.wrong = mixes
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)
        sequences = x.unsqueeze(0) if not self.wrong else x.unsqueeze(1)
        return self.rnn(sequences.expand(4, -1, -1) if not self.wrong else sequences)[0].sum(0)


def test_an_axis_that_is_as_long_as_the_batch_by_chance_is_not_taken_for_it() -> None:
    assert named(TimeFirst(mixes=False)) == ["mixer"]
    assert named(TimeFirst(mixes=True)) == ["mixer", "rnn"]


class KnowsItsBatch(nn.Module):
    """A module that cannot be run by itself on one example more."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.reshaped = CentredOverBatch(), Reshaped()

    def forward(self, x: Tensor) -> Tensor:
        return self.reshaped(self.mixer(x), len(x))


class Reshaped(nn.Module):
    def forward(self, x: Tensor, size: int) -> Tensor:
        return x.view(size, FEATURES)


def test_a_module_that_cannot_be_run_by_itself_is_not_blamed() -> None:
    assert named(KnowsItsBatch()) == ["mixer"]


def test_looking_at_modules_one_by_one_leaves_no_trace() -> None:
    model = Chain()
    before, random_state = weights_of(model), torch.get_rng_state()
    dpdl.check(model, X)
    assert same(before, weights_of(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


# ── what the issue names ────────────────────────────────────────────────────────────────────────────


class ExpertsOfCapacity(nn.Module):
    """A mixture of experts: each takes so many rows of the batch, first come first served."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.gate = nn.Linear(FEATURES, 2)
        self.experts = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = F.one_hot(self.gate(x).argmax(1), 2)
        place = chosen.cumsum(0) * chosen
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return (outputs * (chosen * (place <= self.capacity)).unsqueeze(2)).sum(1)


@pytest.mark.parametrize("capacity", [1, 2])
def test_experts_are_found_whatever_examples_come_first(capacity: int) -> None:
    """That an example is kept out shows only if its neighbour chooses the same expert, and then another."""
    missed = 0
    for seed in range(10):
        x = torch.randn(16, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        model = nn.Sequential(nn.Linear(FEATURES, FEATURES), ExpertsOfCapacity(capacity)).double()
        missed += not named(model, x)
    assert missed == 0


class CrowdOfTen(nn.Module):
    """Keeps examples apart until there are ten."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if len(x) >= 10 else x


def test_the_experts_are_named_also_where_only_absence_shows_them() -> None:
    """All choose the first expert, whatever they are."""
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), ExpertsOfCapacity(2), nn.Linear(FEATURES, 2)).double()
    model[1].gate.bias.data.copy_(torch.tensor([100.0, 0.0]))
    (finding,) = dpdl.check(model, X).findings
    assert finding.module == "1"
    assert "leaving out one example" in str(finding)


def test_dropout_hides_no_experts() -> None:
    model = nn.Sequential(nn.Dropout(), ExpertsOfCapacity(2)).double()
    model[1].gate.bias.data.copy_(torch.tensor([100.0, 0.0]))
    assert named(model) == ["1"]


class Noisy(nn.Module):
    """Random in eval mode too, by the shape of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_random_numbers_of_another_shape_are_not_blamed() -> None:
    assert dpdl.check(nn.Sequential(nn.Linear(FEATURES, 4), Noisy()).double(), X)


class Places(nn.Module):
    """Scales each example by its place in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(1, len(x) + 1).unsqueeze(1)


def test_a_place_in_the_batch_is_found() -> None:
    assert named(nn.Sequential(nn.Tanh(), Places())) == ["1"]


def test_rounding_by_kernels_of_another_size_is_not_blamed() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        layers = [m for _ in range(8) for m in (nn.Linear(64, 64), nn.ReLU(), nn.LayerNorm(64))]
        model, x = nn.Sequential(*layers), torch.randn(2, 64)
    assert 0 < (model(x)[1:] - model(x[1:])).abs().max() < 1e-4  # a single row takes a kernel of its own
    assert dpdl.check(model, x)


def test_what_only_the_whole_batch_brings_out_is_found() -> None:
    assert not dpdl.check(nn.Sequential(CrowdOfTen()), torch.randn(12, 3))
    # Where random numbers depend on the size of the batch, leaving an example out tells nothing.
    assert not dpdl.check(nn.Sequential(CrowdOfTen(), Noisy()), torch.randn(12, 3))


def test_a_contrastive_loss_is_refused() -> None:
    def contrastive(outputs: Tensor, _: object) -> Tensor:
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))

    with pytest.raises(LossError):
        dpdl.check(nn.Linear(FEATURES, 4).double(), (X, Y), contrastive)


# ── remedies ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.BatchNorm1d(FEATURES),
        lambda: nn.BatchNorm1d(FEATURES, affine=False),
        lambda: nn.SyncBatchNorm(FEATURES),
        InstanceNormThatTracks,
    ],
)
def test_where_fix_would_help_the_remedy_says_so_and_is_right(build: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(build()).double()
    found = dpdl.check(model, X)
    assert "dpdl.fix(model)" in str(found)
    assert dpdl.check(fix(model), X)


def test_the_remedy_does_not_make_a_constant_of_features() -> None:
    text = str(dpdl.check(nn.BatchNorm1d(32), torch.randn(8, 32)))
    assert "nn.GroupNorm(2, 32" in text


def test_where_fix_would_not_help_it_is_not_named() -> None:
    assert "dpdl.fix" not in str(dpdl.check(nn.Sequential(CentredOverBatch()), X))


def test_a_model_without_a_shape_is_refused_in_words() -> None:
    with pytest.raises(ModelError, match=r"'0' \(LazyLinear\) has no shape yet"):
        dpdl.check(nn.Sequential(nn.LazyLinear(3)), X)
