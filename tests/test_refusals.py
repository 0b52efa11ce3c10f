"""What a run refuses once it is under way: named, with the remedy, with nothing spent, and it can go on."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dpdl
from dpdl.errors import LossError, ParameterError, PlanExhaustedError, StepError, WrapError
from tests.small_run import CLASSES, N, examples, network, refused, released, same, sgd, small_run, train_on, weights_of

X, Y = examples()


def loss_of(private: dpdl.Private, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(private.model(x), y)


def assert_goes_on(private: dpdl.Private, batch: Any) -> None:
    """The open batch can still be trained on, for one step."""
    before = private.optimizer.steps_taken
    weights = weights_of(private.model)
    train_on(private, batch)
    assert private.optimizer.steps_taken == before + 1
    assert not same(weights, weights_of(private.model))


# ── batches that are not the private loader's ───────────────────────────────────────────────────────


def test_a_batch_before_the_loader_is_iterated_is_refused() -> None:
    private = small_run()
    with refused(private, StepError, "12 examples", "private loader", "torch.no_grad()"):
        loss_of(private, (X, Y))
    assert_goes_on(private, next(iter(private.loader)))


def test_a_batch_between_two_steps_is_refused() -> None:
    private = small_run()
    batch = next(iter(private.loader))
    train_on(private, batch)
    with refused(private, StepError, "outside of a private batch", "private loader yields"):
        loss_of(private, batch)
    assert_goes_on(private, next(iter(private.loader)))


@pytest.mark.parametrize("size", [1, 5, 11, 13, 24])
def test_a_batch_of_another_size_is_refused(size: int) -> None:
    private = small_run()
    batch = next(iter(private.loader))
    with refused(private, StepError, f"{size} examples", "has 12", "whole"):
        loss_of(private, examples(size))
    assert_goes_on(private, batch)


def test_training_on_examples_when_the_draw_is_empty_is_refused() -> None:
    private = small_run(loader=None, dataset=TensorDataset(*examples()), batch_size=1, steps=50)
    for x, y in private.loader:
        if len(x) == 0:
            with refused(private, StepError, "12 examples", "has 0"):
                loss_of(private, (X, Y))
            return
        train_on(private, (x, y))
    pytest.fail("the seed drew no empty batch")


# ── calls out of order ──────────────────────────────────────────────────────────────────────────────


def test_a_step_before_any_batch_is_refused() -> None:
    private = small_run()
    with refused(private, StepError, "without a private batch", "make_private returned"):
        private.optimizer.step()
    assert_goes_on(private, next(iter(private.loader)))


def test_a_step_without_backward_is_refused() -> None:
    private = small_run()
    batch = next(iter(private.loader))
    loss_of(private, batch)
    with refused(private, StepError, "before backward()", "12 examples"):
        private.optimizer.step()
    assert_goes_on(private, batch)


def test_a_second_step_on_one_batch_is_refused() -> None:
    private = small_run()
    iterator = iter(private.loader)
    train_on(private, next(iterator))
    with refused(private, StepError, "without a private batch", "good for one step"):
        private.optimizer.step()


def test_backward_of_an_earlier_batch_is_refused_and_does_not_count_for_this_one() -> None:
    private = small_run()
    x, y = next(iter(private.loader))
    kept = F.cross_entropy(private.model(x), y)
    batch = next(iter(private.loader))
    with refused(private, StepError, "earlier batch", "before optimizer.step()"):
        kept.backward()
    with refused(private, StepError, "before backward()"):
        private.optimizer.step()
    assert_goes_on(private, batch)


def test_backward_after_the_step_is_refused() -> None:
    private = small_run()
    for x, y in private.loader:
        loss = F.cross_entropy(private.model(x), y)
        loss.backward(retain_graph=True)
        private.optimizer.step()
        with refused(private, StepError, "earlier batch"):
            loss.backward()


@pytest.mark.parametrize("way", ["one loss, again", "two losses", "two forwards", "two forwards in one loss"])
def test_two_backwards_of_one_batch_are_clipped_as_one(way: str) -> None:
    """Clipped apart, their sums would add up to twice the sensitivity."""
    private = small_run(max_grad_norm=1e-3)
    x, y = next(iter(private.loader))
    output = private.model(x)
    first = F.cross_entropy(output, y)
    second = F.cross_entropy(private.model(x), y) if "two forwards" in way else output.square().sum(1).mean()
    if way == "two forwards in one loss":
        (first + second).backward()
    else:
        first.backward(retain_graph=True)
        (first if way == "one loss, again" else second).backward()
    private.optimizer.step()
    assert private.optimizer.diagnostics.examples == private.optimizer.diagnostics.clipped == N
    norm = torch.cat([g.flatten() for g in released(private).values()]).norm()
    assert 0 < norm <= N * 1e-3


def test_a_refused_second_backward_adds_nothing_to_the_first() -> None:
    private, undisturbed = small_run(), small_run()
    x, y = next(iter(private.loader))
    output = private.model(x)
    F.cross_entropy(output, y).backward(retain_graph=True)
    with refused(private, LossError, "loss_reduction"):
        output.square().sum().backward()
    private.optimizer.step()
    train_on(undisturbed, next(iter(undisturbed.loader)))
    assert same(released(private), released(undisturbed))


def test_a_loss_of_a_detached_output_brings_no_step() -> None:
    private = small_run()
    x, y = next(iter(private.loader))
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(private.model(x).detach() * scale, y)
    with refused(private, LossError, "outside of the private model", "detach()"):
        loss.backward()
    with refused(private, StepError, "has brought no gradients", "loss of its output"):
        private.optimizer.step()
    assert_goes_on(private, (x, y))


def test_gradients_asked_of_the_output_alone_are_given_and_are_no_backward() -> None:
    private = small_run()
    x, y = next(iter(private.loader))
    output = private.model(x)
    loss = F.cross_entropy(output, y)
    (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
    assert gradient.shape == (N, CLASSES)
    with refused(private, StepError, "before backward()"):
        private.optimizer.step()
    loss.backward()
    private.optimizer.step()
    assert private.optimizer.steps_taken == 1


def test_gradients_asked_of_parameters_are_not_given() -> None:
    private = small_run()
    loss = loss_of(private, next(iter(private.loader)))
    found = torch.autograd.grad(loss, list(private.model.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in found)


# ── batches that are skipped ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("went_backward", [False, True])
@pytest.mark.parametrize("physical", [None, 5])
def test_a_skipped_batch_is_refused_at_the_next_one(went_backward: bool, physical: int | None) -> None:
    private = small_run(max_physical_batch_size=physical)
    iterator = iter(private.loader)
    batch = next(iterator)
    if went_backward:
        loss_of(private, batch).backward()
    with refused(private, StepError, "not followed by optimizer.step()", "max_physical_batch_size"):
        next(iterator)


def test_a_batch_that_is_open_is_not_overtaken_by_another_iterators() -> None:
    private = small_run(batch_size=4)
    first, second = iter(private.loader), iter(private.loader)
    batch = next(second)
    with refused(private, StepError, "one iterator at a time"):
        next(first)
    assert_goes_on(private, batch)


@pytest.mark.parametrize("parts_done", [1, 2])
@pytest.mark.parametrize("last", ["drawn", "backward", "stepped"])
def test_a_half_done_logical_batch_leaves_nothing_behind(parts_done: int, last: str) -> None:
    """Broken off in its parts, then a new pass: the release is that of an undisturbed run, at noise 0."""
    disturbed = small_run(max_physical_batch_size=4)
    for number, batch in enumerate(disturbed.loader, start=1):
        if number < parts_done or last == "stepped":
            train_on(disturbed, batch)
        elif last == "backward":
            loss_of(disturbed, batch).backward()
        if number == parts_done:
            break
    assert disturbed.optimizer.steps_taken == 0

    undisturbed = small_run(max_physical_batch_size=4)
    for private in (disturbed, undisturbed):
        iterator = iter(private.loader)
        for _ in range(3):
            train_on(private, next(iterator))
        assert private.optimizer.steps_taken == 1
        assert private.optimizer.diagnostics.examples == N
    assert same(released(disturbed), released(undisturbed))


# ── past the plan, and around the sampling ──────────────────────────────────────────────────────────


def test_a_pass_after_the_plans_last_step_is_refused() -> None:
    private = small_run(batch_size=4, steps=4)  # passes of 3 steps
    sizes = []
    for _ in range(2):
        taken = private.optimizer.steps_taken
        for batch in private.loader:
            train_on(private, batch)
        sizes.append(private.optimizer.steps_taken - taken)
    assert sizes == [3, 1]
    with refused(private, PlanExhaustedError, "4 steps are taken", "more steps"):
        iter(private.loader)


def test_a_step_past_the_plan_is_refused_whatever_iterator_it_came_from() -> None:
    private = small_run(steps=2, batch_size=4)
    early = iter(private.loader)
    train_on(private, next(early))
    for batch in private.loader:
        train_on(private, batch)
    assert private.optimizer.steps_taken == 2
    with refused(private, StepError):
        train_on(private, next(early))


def test_no_draw_is_trained_on_twice_however_iterators_are_mixed() -> None:
    """Each step's batch must be drawn anew: a draw used for two releases is not Poisson sampling twice."""
    x, y = examples(40)
    private = small_run(dataset=TensorDataset(x, y, torch.arange(40)), batch_size=8, steps=20)
    draws: list[tuple[int, ...]] = []

    def take(iterator: Any) -> None:
        *batch, rows = next(iterator)
        draws.append(tuple(rows.tolist()))
        train_on(private, batch)

    with contextlib.suppress(StepError):  # refusing the stale iterator is as good
        outer = iter(private.loader)
        take(outer)
        inner = iter(private.loader)
        take(inner)
        take(inner)
        take(outer)
        take(outer)
    assert len(draws) >= 3
    assert len(set(draws)) == len(draws), "the same draw was released twice"


# ── parameters and gradients from elsewhere ─────────────────────────────────────────────────────────


def test_an_optimizer_with_a_foreign_parameter_is_refused() -> None:
    model, foreign = network(), nn.Parameter(torch.zeros(7))
    before = weights_of(model)
    with pytest.raises(WrapError, match=r"Parameter 4 .*group 0 .*\(7,\).*model\.parameters\(\)"):
        small_run(model, optimizer=lambda p: sgd([*p, foreign]))
    assert same(before, weights_of(model))
    small_run(model)  # the refusal left the model unclaimed


def test_groups_cannot_be_added_to_the_private_optimizer() -> None:
    private = small_run()
    foreign = nn.Parameter(torch.zeros(7))
    with refused(private, WrapError, "add_param_group", "call make_private", "requires_grad_(False)"):
        private.optimizer.add_param_group({"params": [foreign]})
    assert_goes_on(private, next(iter(private.loader)))


@pytest.mark.parametrize("way", ["inner.add_param_group", "appended to a group", "appended to the groups"])
def test_a_foreign_parameter_smuggled_in_is_refused_at_the_step(way: str) -> None:
    private = small_run()
    foreign = nn.Parameter(torch.zeros(7, dtype=torch.float64))
    group = {"params": [foreign], **private.optimizer.defaults}
    if way == "inner.add_param_group":
        private.optimizer.inner.add_param_group({"params": [foreign]})
    elif way == "appended to a group":
        private.optimizer.param_groups[0]["params"].append(foreign)
    else:
        private.optimizer.param_groups.append(group)
    x, y = next(iter(private.loader))
    F.cross_entropy(private.model(x), y).backward()
    with refused(private, StepError, "(7,)", "not part of the private model", "optimizer of its own"):
        private.optimizer.step()
    assert foreign.abs().sum() == 0


def test_a_head_replaced_after_wrapping_is_refused_by_name_of_what_is_missing() -> None:
    private = small_run()
    private.model.module[2] = nn.Linear(4, CLASSES, dtype=torch.float64)
    x, y = next(iter(private.loader))
    F.cross_entropy(private.model(x), y).backward()
    with pytest.raises(StepError, match=r"\(2, 4\).*not part of the private model"):
        private.optimizer.step()
    assert private.optimizer.steps_taken == 0


def test_the_wrapped_optimizer_cannot_step_by_itself() -> None:
    private = small_run()
    batch = next(iter(private.loader))
    for p in private.model.parameters():
        p.grad = torch.ones_like(p)
    with refused(private, StepError, "SGD.step()", "without noise", "make_private returned"):
        private.optimizer.inner.step()
    assert_goes_on(private, batch)


def test_plain_gradients_of_the_unwrapped_module_are_refused() -> None:
    private = small_run()
    x, y = next(iter(private.loader))
    x, y = x.as_subclass(Tensor), y.as_subclass(Tensor)  # as tensors that were never followed
    F.cross_entropy(private.model.module(x), y).backward()
    F.cross_entropy(private.model(x), y).backward()
    with refused(private, StepError, "'0.weight'", "did not come from the private model", "zero_grad()"):
        private.optimizer.step()
    private.optimizer.zero_grad()
    F.cross_entropy(private.model(x), y).backward()
    private.optimizer.step()
    assert private.optimizer.steps_taken == 1


def test_a_plain_gradient_of_a_parameter_that_is_then_frozen_does_not_move_it() -> None:
    """The wrapped optimizer steps on whatever gradient it finds, frozen or not."""
    private = small_run()
    frozen = private.model.module[0].weight
    before = frozen.detach().clone()
    F.cross_entropy(private.model.module(X), Y).backward()
    for p in private.model.parameters():
        p.grad = p.grad if p is frozen else None
    frozen.requires_grad_(False)
    x, y = next(iter(private.loader))
    F.cross_entropy(private.model(x), y).backward()
    with contextlib.suppress(StepError):
        private.optimizer.step()
    assert torch.equal(frozen, before), "a raw gradient was applied without clipping or noise"


# ── twice ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("again", ["model", "optimizer", "private model", "private optimizer", "private loader"])
def test_what_is_private_cannot_be_made_private_again(again: str) -> None:
    private = small_run()
    fresh = network()
    model, optimizer = fresh, sgd(fresh.parameters())
    plan = private.optimizer.plan
    loader = private.loader._loader
    if again == "model":
        model = private.model.module
        optimizer = sgd(model.parameters())
    elif again == "optimizer":
        model, optimizer = private.model.module, private.optimizer.inner
    elif again == "private model":
        model = private.model
        optimizer = sgd(model.parameters())
    elif again == "private optimizer":
        optimizer = private.optimizer
    else:
        loader = private.loader
    with refused(private, WrapError, "private", again.removeprefix("private ")):
        dpdl.make_private(model, optimizer, loader, plan)
    assert_goes_on(private, next(iter(private.loader)))


@pytest.mark.parametrize("shared", ["parent", "child"])
def test_the_parameters_of_a_run_cannot_be_made_private_again_in_another_module(shared: str) -> None:
    private = small_run()
    module = nn.Sequential(private.model.module) if shared == "parent" else private.model.module[0]
    with refused(private, WrapError, "private run already"):
        small_run(module)


def test_a_deep_copy_of_the_model_can_start_a_run_of_its_own() -> None:
    first = small_run()
    second = small_run(copy.deepcopy(first.model))
    assert_goes_on(second, next(iter(second.loader)))
    assert first.optimizer.steps_taken == 0


# ── arguments of make_private ───────────────────────────────────────────────────────────────────────


def test_arguments_in_the_wrong_order_are_refused() -> None:
    private = small_run()
    plan, loader = private.optimizer.plan, private.loader._loader
    model = network()
    with pytest.raises(WrapError, match=r"optimizer must be a Optimizer, got DataLoader.*The order is"):
        dpdl.make_private(model, loader, sgd(model.parameters()), plan)
    with pytest.raises(WrapError, match="plan must be a PrivacyPlan, got dict"):
        dpdl.make_private(model, sgd(model.parameters()), loader, {"epsilon": 3.0})
    with pytest.raises(WrapError, match="model must be a Module"):
        dpdl.make_private(network, sgd(model.parameters()), loader, plan)


def test_optimizers_that_cannot_be_private_are_refused() -> None:
    for kind, remedy in ((torch.optim.LBFGS, "SGD or Adam"), (torch.optim.SparseAdam, "Use Adam")):
        with pytest.raises(WrapError, match=remedy):
            small_run(optimizer=lambda p, kind=kind: kind(list(p)))


def test_unknown_arguments_fail() -> None:
    with pytest.raises(TypeError):
        dpdl.Execution(microbatch=3)  # type: ignore[call-arg]
    with pytest.raises(ParameterError):
        dpdl.Execution(engine="hooks")  # type: ignore[arg-type]
