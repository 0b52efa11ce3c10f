"""Whose gradient is whose where the data decides: exact, or refused; never one example's for another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import dpdl
from dpdl.errors import ModelError
from dpdl.execution import Execution
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.boundary import Passage, visit_gradients
from dpdl.per_sample.runner import PerSampleRunner
from dpdl.per_sample.tape.engine import TapeEngine
from tests.small_run import small_run


class Between(nn.Module):
    """A function of hidden values between two layers."""

    def __init__(self, function: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.middle, self.first(x)).tanh())


class ClippedOverTheBatch(torch.autograd.Function):
    """Its backward lets examples meet, once there are many."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * min(1.0, 3 / float(gradient.norm()))


def regrouped(layer: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """Positive examples first; which are positive is known after the first batch only."""
    positive = [i for i in range(len(h)) if float(h[i].sum()) > 0]
    order = positive + [i for i in range(len(h)) if i not in positive]
    back = [order.index(i) for i in range(len(h))]
    return layer(h[order])[back]


def exchanged_far_apart(layer: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """Rows change places with those eight further on."""
    return layer(h.roll(8, 0)).roll(-8, 0) if len(h) > 8 else layer(h)


def clipped(layer: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    return layer(ClippedOverTheBatch.apply(h))


WAYS = {"regrouped": regrouped, "far apart": exchanged_far_apart, "backward that mixes": clipped}
N = 30


def norms_of(model: nn.Module, x: Tensor) -> Tensor:
    """By the tape, through the first-batch checks, of a loss that is large enough to be clipped over the batch."""
    runner = PerSampleRunner(model, Execution(engine="tape", loss_reduction="sum"))
    runner.begin_batch(x, len(x))
    passages: list[Passage] = []
    parameters = dict(model.named_parameters())
    output = runner.forward(ExampleBatch.from_call((x,), {}), parameters, passages.append)
    (10 * output).square().sum().backward()
    norms: list[Tensor] = []
    visit_gradients(passages, lambda part: norms.append(part.norms()))
    return torch.cat(norms)


def alone(model: nn.Module, x: Tensor) -> Tensor:
    """The same by plain autograd, one example at a time."""
    found = []
    for row in x:
        model.zero_grad()
        (10 * model(row.unsqueeze(0))).square().sum().backward()
        found.append(torch.sqrt(sum((p.grad.square().sum() for p in model.parameters()), start=torch.zeros(()))))
    model.zero_grad()
    return torch.stack(found)


def is_exact_or_refused(function: Callable[..., Tensor]) -> bool:
    torch.manual_seed(0)
    model, x = Between(function).double(), torch.randn(N, 4, dtype=torch.float64)
    try:
        measured = norms_of(model, x)
    except ModelError:
        return True
    if function is clipped:
        return False  # the backward itself depends on the batch: there is no right answer but a refusal
    return torch.allclose(measured, alone(model, x))


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_move_with_the_data_are_followed_or_refused(way: str) -> None:
    assert is_exact_or_refused(WAYS[way])


def test_without_the_rehearsal_they_would_be_taken_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TapeEngine, "_rehearsal", lambda *_: None)
    assert not all(is_exact_or_refused(function) for function in WAYS.values())


def test_a_rehearsal_that_was_interrupted_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Between(lambda layer, h: layer(h)), torch.randn(N, 4)
    engine, batch = TapeEngine(model), ExampleBatch.from_call((x,), {})
    forward = engine.forward(batch, dict(model.named_parameters()))

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dpdl.per_sample.tape.engine.leaf_gradients", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(engine.gradients([(forward, {0: torch.ones(N, 3)})]))
    assert not engine._known_ways


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_parameters_of_another_optimizer_receive_no_gradient(reentrant: bool | None) -> None:
    def run(layer: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        return layer(h) if reentrant is None else checkpoint(layer, h, use_reentrant=reentrant)

    x, y = torch.randn(12, 4), torch.arange(12) % 3
    model = Between(run)
    trained = [*model.first.parameters(), *model.middle.parameters()]
    private = small_run(model, dataset=TensorDataset(x, y), optimizer=lambda _: torch.optim.SGD(trained, lr=0.1))
    inputs, targets = next(iter(private.loader))
    F.cross_entropy(private.model(inputs), targets).backward()
    private.optimizer.step()
    assert private.model.engine_name == "tape"
    assert all(p.grad is None for p in model.last.parameters())


def test_a_tensor_taken_from_inside_the_model_is_refused_in_the_loss() -> None:
    inside: list[Tensor] = []
    model = Between(lambda layer, h: layer(h))
    model.middle.register_forward_hook(lambda _m, _i, output: inside.append(output))
    x = torch.randn(5, 4)
    engine = TapeEngine(model)
    engine.forward(ExampleBatch.from_call((x,), {}), dict(model.named_parameters()))
    with pytest.raises(ModelError, match="from inside the private model"):
        inside[-1].square().sum().backward()
    assert dpdl.per_sample_norms(model, lambda o, _: o.sum(), x, None, loss_reduction="sum").shape == (5,)
