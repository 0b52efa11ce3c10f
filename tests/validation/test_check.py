"""`dpdl.check` finds what mixes examples by running the model, says where, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dpdl
from dpdl.errors import LossError, ParameterError
from dpdl.validation import Check
from tests.small_run import CLASSES, FEATURES, examples, network, same, weights_of
from tests.validation.mixers import (
    BATCH_NORMS,
    KEEPERS,
    MIXERS,
    CentredOverBatch,
    ReassignedBuffer,
    SoftmaxOverBatch,
    model_with,
)

X, Y = examples()


class PerExampleNorms(nn.Module):
    """Statistics within an example are fine."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LayerNorm(FEATURES)
        self.group = nn.GroupNorm(1, FEATURES)
        self.instance = nn.InstanceNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.instance(self.group(self.layer(x)).unsqueeze(1)).squeeze(1) - x.mean(1, keepdim=True)


HONEST: dict[str, Callable[[], nn.Module]] = {
    "Tanh": nn.Tanh,
    "norms within an example": PerExampleNorms,
    "Dropout": lambda: nn.Dropout(0.5),
    "in-place ReLU": lambda: nn.ReLU(inplace=True),
    "BatchNorm1d in eval mode": lambda: nn.BatchNorm1d(FEATURES).eval(),
    "softmax within an example": lambda: nn.Softmax(dim=1),
}


@pytest.mark.parametrize("name", [*BATCH_NORMS, *MIXERS])
def test_what_mixes_is_found_and_its_path_named(name: str) -> None:
    found = dpdl.check(model_with({**BATCH_NORMS, **MIXERS}[name]()), X)
    assert not found
    assert [finding.module for finding in found.findings if finding.kind == "mixes examples"] in (
        ["body.bad"],
        ["body.bad.lstm"],  # the part of it that mixes
    )
    assert "body.bad" in str(found)


@pytest.mark.parametrize("name", KEEPERS)
def test_what_keeps_state_is_found_and_its_buffer_named(name: str) -> None:
    found = dpdl.check(model_with(KEEPERS[name]()), X)
    assert not found
    kept = [finding for finding in found.findings if finding.kind == "keeps state"]
    assert all(finding.module.startswith("body.bad") for finding in kept)
    assert any(word in str(found) for word in ("'seen'", "'running_mean'"))


def test_a_buffer_that_forward_replaces_is_found_too() -> None:
    """Its statistics would never arrive in the model, or arrive un-noised."""
    assert "'seen'" in str(dpdl.check(model_with(ReassignedBuffer()), X))


@pytest.mark.parametrize("name", HONEST)
def test_what_keeps_examples_apart_is_not_blamed(name: str) -> None:
    found = dpdl.check(model_with(HONEST[name]()), X)
    assert found, str(found)
    assert "kept apart" in str(found)


def test_all_culprits_are_named_at_once() -> None:
    model = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, FEATURES), CentredOverBatch(), nn.Tanh())
    found = dpdl.check(model.double(), X)
    assert {finding.module for finding in found.findings} >= {"0"}
    model[0].eval()
    assert [finding.module for finding in dpdl.check(model, X).findings] == ["2"]


def test_a_model_that_mixes_by_itself_is_named_as_such() -> None:
    assert "the model itself (SoftmaxOverBatch)" in str(dpdl.check(SoftmaxOverBatch(), X))


def test_the_remedy_for_batch_normalisation_runs_as_it_is_written() -> None:
    text = str(dpdl.check(nn.BatchNorm2d(48), torch.randn(4, 48, 2, 2)))
    expression = text[text.index("nn.GroupNorm") : text.index(")", text.index("nn.GroupNorm")) + 1]
    replacement = eval(expression, {"nn": nn})
    assert replacement(torch.randn(4, 48, 2, 2)).shape == (4, 48, 2, 2)


@pytest.mark.parametrize(
    "call",
    [X, (X,), {"input": X}],
    ids=["tensor", "tuple", "keywords"],
)
def test_inputs_are_given_as_to_per_sample_gradients(call: object) -> None:
    assert dpdl.check(nn.Linear(FEATURES, 1).double(), call)


def test_one_example_is_too_few() -> None:
    with pytest.raises(ParameterError, match="at least two examples"):
        dpdl.check(network(), X[:1])


def test_a_loss_is_tried_if_there_is_one() -> None:
    assert dpdl.check(network(), (X, Y), F.cross_entropy)
    with pytest.raises(LossError, match="loss_reduction"):
        dpdl.check(network(), (X, Y), lambda outputs, y: F.cross_entropy(outputs, y, reduction="sum"))
    with pytest.raises(LossError, match="neither a mean nor a sum"):
        dpdl.check(network(), (X, Y), lambda outputs, y: outputs.std(0).sum())


class NoisyLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


@pytest.mark.parametrize("name", [*BATCH_NORMS, *MIXERS, *KEEPERS, "NoisyLayer", "Dropout"])
@pytest.mark.parametrize("with_loss", [False, True])
def test_the_model_and_torchs_random_numbers_are_left_as_they_were(name: str, with_loss: bool) -> None:
    bad = {**BATCH_NORMS, **MIXERS, **KEEPERS, **HONEST, "NoisyLayer": NoisyLayer}[name]()
    model = model_with(bad)
    model.body.last.eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = weights_of(model)
    modes = [child.training for child in model.modules()]
    random_state = torch.get_rng_state()

    dpdl.check(model, (X, Y) if with_loss else X, F.cross_entropy if with_loss else None)

    assert same(before, weights_of(model))
    assert modes == [child.training for child in model.modules()]
    assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) for p in model.parameters())
    assert torch.equal(random_state, torch.get_rng_state())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.modules())


class Fragile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken by its author")


def test_a_model_that_raises_says_so_in_its_own_words_and_keeps_no_hook() -> None:
    model = model_with(Fragile())
    with pytest.raises(RuntimeError, match="broken by its author"):
        dpdl.check(model, X)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.modules())


# ── parameters that a forward writes to ─────────────────────────────────────────────────────────────


class DataDependentStart(nn.Module):
    """Activation normalisation: the first batch decides where a parameter starts."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(FEATURES))
        self.started = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.started:
            self.shift.data.copy_(-x.detach().mean(0))
            self.started = True
        return x + self.shift


class TokenModel(nn.Module):
    """`max_norm` rescales the rows that a batch looks up, in place: which ones, shows in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4, max_norm=1.0)
        self.last = nn.Linear(4, CLASSES)
        self.table.weight.data.mul_(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table(x).mean(1))


WRITERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "data-dependent start": (lambda: model_with(DataDependentStart()), X),
    "Embedding(max_norm=)": (lambda: TokenModel().double(), torch.arange(12).view(4, 3)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_forward_that_writes_to_a_parameter_is_found(name: str) -> None:
    build, inputs = WRITERS[name]
    found = dpdl.check(build(), inputs)
    assert not found
    assert "'table'" in str(found) or "'body.bad'" in str(found)


@pytest.mark.parametrize("name", WRITERS)
def test_checking_leaves_parameters_alone_even_if_the_forward_writes_to_them(name: str) -> None:
    build, inputs = WRITERS[name]
    model = build()
    before = weights_of(model)
    dpdl.check(model, inputs)
    assert same(before, weights_of(model))


def test_a_result_is_true_exactly_if_nothing_was_found() -> None:
    assert Check(findings=())
    assert not dpdl.check(SoftmaxOverBatch(), X)
