"""Calls out of order, batches of another size, parameters frozen in between; and that a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpdl.compat.deepee import PrivacyWrapper
from dpdl.errors import ModelError, StepError
from tests.compat.deepee.training import examples, gradients, network, release

B = 4

STEPS: dict[str, Callable[[PrivacyWrapper], object]] = {
    "forward": lambda model: F.cross_entropy(model(examples(B)[0]), examples(B)[1]).backward(),
    "clip": lambda model: model.clip_and_accumulate(),
    "noise": lambda model: model.noise_gradient(),
    "prepare": lambda model: model.prepare_next_batch(),
}
ORDER = list(STEPS)


def after(done: int) -> PrivacyWrapper:
    """A wrapper that has gone `done` of its calls."""
    model = PrivacyWrapper(network(), B, 1.0, 1.0)
    for name in ORDER[:done]:
        STEPS[name](model)
    return model


@pytest.mark.parametrize("done", [0, 1, 2, 3])
@pytest.mark.parametrize("call", ORDER)
def test_only_the_next_call_is_taken(done: int, call: str) -> None:
    model = after(done)
    before = (model._forward_succesful, model._clip_succesful, model._noise_succesful, model._steps_taken)
    if ORDER.index(call) == done:
        STEPS[call](model)
        return
    with pytest.raises(RuntimeError, match="must be called") as refusal:
        STEPS[call](model)
    assert isinstance(refusal.value, StepError)
    assert before == (model._forward_succesful, model._clip_succesful, model._noise_succesful, model._steps_taken)
    for name in ORDER[done:]:  # and the step can go on
        STEPS[name](model)
    assert model._steps_taken == 1
    assert model.ledger.releases == 1


def test_flags_and_count_go_with_the_step() -> None:
    flags = [(m._forward_succesful, m._clip_succesful, m._noise_succesful) for m in map(after, range(4))]
    assert flags == [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]


def test_clipping_without_a_backward_says_so() -> None:
    model = after(0)
    model(examples(B)[0])
    with pytest.raises(RuntimeError, match="No gradients have been calculated yet"):
        model.clip_and_accumulate()


@pytest.mark.parametrize("n", [B - 1, B + 1, 0])
def test_only_batches_of_num_replicas_are_trained_on(n: int) -> None:
    model = after(0)
    with pytest.raises(ValueError, match=rf"num_replicas \({B}\) must be equal to the batch size \({n}\)"):
        model(examples(n)[0])
    release(model, *examples(B))


def test_an_unknown_reduction_is_refused_first() -> None:
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        after(0).clip_and_accumulate(reduce="foo")  # type: ignore[arg-type]


def test_a_backward_on_an_old_loss_is_refused() -> None:
    x, y = examples(B)
    model = after(0)
    old = F.cross_entropy(model(x), y)
    old.backward(retain_graph=True)
    model.clip_and_accumulate()
    model.noise_gradient()
    model.prepare_next_batch()
    with pytest.raises(StepError):
        old.backward()


def test_two_losses_of_a_batch_are_clipped_together() -> None:
    x, y = examples(B)
    net = network()
    model = PrivacyWrapper(net, B, 0.1, 0.0)
    output = model(x)
    F.cross_entropy(output, y).backward(retain_graph=True)
    F.cross_entropy(output, y).backward()
    model.clip_and_accumulate()
    model.noise_gradient()
    other = network()
    release(PrivacyWrapper(other, B, 0.1, 0.0), x, y, loss=lambda output, y: 2 * F.cross_entropy(output, y))
    assert torch.allclose(gradients(net), gradients(other))


def test_unfreezing_needs_update_clones_and_then_trains() -> None:
    x, y = examples(B)
    net = network()
    net[2].requires_grad_(False)
    model = PrivacyWrapper(net, B, 1.0, 1.0)
    release(model, x, y)
    model.prepare_next_batch()
    assert net[2].weight.grad is None
    net.requires_grad_(True)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="update_clones"):
        model.clip_and_accumulate()
    model.update_clones()
    release(model, x, y)
    assert net[2].weight.grad is not None
    assert model.ledger.releases == 2


def test_update_clones_drops_a_batch_under_way_but_no_release() -> None:
    x, y = examples(B)
    for done in (1, 2):
        model = after(done)
        model.update_clones()
        assert not model._forward_succesful
        assert model.ledger.releases == 0
        release(model, x, y)
    model.update_clones()
    assert model._noise_succesful  # released: the step has to be closed
    model.prepare_next_batch()
    assert model._steps_taken == 1


def test_exchanged_parts_are_trained_after_update_clones() -> None:
    x, y = examples(B)
    net = network()
    model = PrivacyWrapper(net, B, 1.0, 1.0)
    net[2] = nn.Linear(4, 3).double()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="update_clones"):
        model.clip_and_accumulate()
    model.update_clones()
    release(model, x, y)
    assert net[2].weight.grad is not None


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing to train"):
        PrivacyWrapper(network().requires_grad_(False), B, 1.0, 1.0)
