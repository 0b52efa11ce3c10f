"""No optimizer gets to step on a gradient without noise, whichever way it came about."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpdl.compat.deepee import PrivacyWrapper
from dpdl.errors import LossError, StepError, WrapError
from dpdl.execution import Execution
from tests.compat.deepee.training import examples, network, release

B = 4


def start() -> tuple[PrivacyWrapper, torch.optim.Optimizer]:
    model = PrivacyWrapper(network(), B, 1.0, 1.0)
    return model, torch.optim.SGD(model.wrapped_model.parameters(), lr=0.1)


def weights(model: PrivacyWrapper) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def unchanged(model: PrivacyWrapper, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_no_gradient_is_in_p_grad_until_it_has_its_noise() -> None:
    model, _ = start()
    F.cross_entropy(model(examples(B)[0]), examples(B)[1]).backward()
    assert all(p.grad is None for p in model.parameters())
    model.clip_and_accumulate()
    assert all(p.grad is None for p in model.parameters())
    model.noise_gradient()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("done", [1, 2])
def test_a_step_before_the_noise_is_refused(done: int) -> None:
    model, optimizer = start()
    before = weights(model)
    F.cross_entropy(model(examples(B)[0]), examples(B)[1]).backward()
    if done == 2:
        model.clip_and_accumulate()
    with pytest.raises(RuntimeError, match=r"before .*noise_gradient"):
        optimizer.step()
    assert unchanged(model, before)
    if done == 1:
        model.clip_and_accumulate()
    model.noise_gradient()
    optimizer.step()
    assert not unchanged(model, before)


def test_stale_noise_cannot_be_stepped_on_in_the_middle_of_the_next_batch() -> None:
    model, optimizer = start()
    release(model, *examples(B))
    optimizer.step()
    model.prepare_next_batch()
    model(examples(B)[0])
    with pytest.raises(StepError):
        optimizer.step()


def test_a_backward_round_the_wrapper_is_refused_and_leaves_no_gradient() -> None:
    model, _ = start()
    x, y = examples(B)
    with pytest.raises(RuntimeError, match="plain backward"):
        F.cross_entropy(model.wrapped_model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("self_check", [True, False])
def test_a_penalty_on_the_parameters_is_refused_not_dropped(self_check: bool) -> None:
    model, _ = start()
    model.execution = Execution(self_check=self_check)
    x, y = examples(B)
    with pytest.raises(StepError if not self_check else LossError, match=r"without clipping or noise|plain backward"):
        (F.cross_entropy(model(x), y) + sum(p.square().sum() for p in model.parameters())).backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_put_into_p_grad_by_hand_is_refused() -> None:
    model, optimizer = start()
    x, y = examples(B)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"'0.weight'.*zero_grad"):
        optimizer.step()
    assert unchanged(model, before)
    optimizer.zero_grad()
    release(model, x, y)
    optimizer.step()
    assert not unchanged(model, before)


def test_noisy_gradients_may_be_changed_in_place_not_replaced() -> None:
    model, optimizer = start()
    release(model, *examples(B))
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    for p in model.parameters():
        assert p.grad is not None
        p.grad = p.grad + 1
    with pytest.raises(StepError):
        optimizer.step()


def test_any_optimizer_of_any_parent_is_watched_and_no_other_one() -> None:
    model, _ = start()
    parent = nn.Module()
    parent.head, parent.dp = nn.Linear(2, 2), model
    of_parent, of_head = torch.optim.Adam(parent.parameters()), torch.optim.Adam(parent.head.parameters())
    model(examples(B)[0])
    with pytest.raises(StepError):
        of_parent.step()
    parent.head(torch.ones(1, 2)).sum().backward()
    of_head.step()


def test_zero_gradients_and_none_are_no_offence() -> None:
    model, optimizer = start()
    release(model, *examples(B))
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()


def test_a_frozen_parameter_does_not_move_by_an_old_gradient() -> None:
    model, optimizer = start()
    release(model, *examples(B))
    optimizer.step()
    model.prepare_next_batch()
    model.wrapped_model[0].requires_grad_(False)  # type: ignore[index, operator]
    model.update_clones()
    release(model, *examples(B))
    frozen = model.wrapped_model[0].weight.detach().clone()  # type: ignore[index, union-attr, operator]
    optimizer.step()
    assert torch.equal(frozen, model.wrapped_model[0].weight)  # type: ignore[index, union-attr, arg-type]


# ── several wrappers ────────────────────────────────────────────────────────────────────────────────


def test_a_second_wrapper_of_a_model_goes_on_with_its_ledger_and_takes_over() -> None:
    first, _ = start()
    release(first, *examples(B))
    first.prepare_next_batch()
    second = PrivacyWrapper(first.wrapped_model, 2, 1.0, 2.0)
    optimizer = torch.optim.SGD(second.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="taken over"):
        first(examples(B)[0])
    release(second, *examples(2))
    optimizer.step()
    assert second.ledger is first.ledger
    assert second.ledger.releases == 2


def test_spending_outlives_the_wrapper() -> None:
    model, _ = start()
    net = model.wrapped_model
    release(model, *examples(B))
    del model
    gc.collect()
    assert PrivacyWrapper(net, B, 1.0, 1.0).ledger.releases == 1
    assert PrivacyWrapper(copy.deepcopy(net), B, 1.0, 1.0).ledger.releases == 0


def test_a_part_of_a_wrapped_model_cannot_be_wrapped_on_its_own() -> None:
    model, _ = start()
    with pytest.raises(WrapError, match="another model"):
        PrivacyWrapper(model.wrapped_model[0], B, 1.0, 1.0)  # type: ignore[index, arg-type]


def test_a_seeded_run_that_is_resumed_uses_no_noise_twice() -> None:
    x, y = examples(B)
    nets = [network(), network()]
    first = PrivacyWrapper(nets[0], B, 1.0, 1.0, seed=1)
    release(first, x, y)
    resumed = PrivacyWrapper(nets[1], B, 1.0, 1.0, seed=1)
    resumed.resume_from(type(first.ledger).from_json(first.ledger.to_json()))
    release(resumed, x, y)
    grads = [net[0].weight.grad for net in nets]
    assert grads[0] is not None
    assert not torch.equal(grads[0], grads[1])
    assert resumed.ledger.releases == 2
    with pytest.raises(StepError):
        resumed.resume_from(first.ledger)
