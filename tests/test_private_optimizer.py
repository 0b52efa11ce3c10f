"""The private optimizer is a torch optimizer: schedulers, groups, closures and habits work as before."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

import dpdl
from dpdl.errors import PlanExhaustedError, PrivacyError, StepError
from tests.small_run import (
    CLASSES,
    FEATURES,
    LR,
    examples,
    network,
    plain_gradient,
    refused,
    released,
    same,
    small_run,
    step_once,
    train_on,
    weights_of,
)

X, Y = examples()


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


# ── learning rates ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("built_on", ["private", "inner, before wrapping"])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.1),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=6, cycle_momentum=False),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
        ),
    ],
    ids=["StepLR", "OneCycleLR", "LambdaLR", "CosineAnnealingLR", "SequentialLR"],
)
@pytest.mark.filterwarnings("error::UserWarning", "ignore:The epoch parameter")  # SequentialLR of torch 2.6 on itself
def test_schedulers_move_the_learning_rate_that_is_used(make: Any, built_on: str) -> None:
    """No momentum, no noise: a step's length is the learning rate times the gradient that it left behind."""
    model = network()
    plain_optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    early = make(plain_optimizer) if built_on == "inner, before wrapping" else None
    private = small_run(model, optimizer=lambda _: plain_optimizer)
    scheduler = early or make(private.optimizer)
    twin = torch.optim.SGD(network().parameters(), lr=LR)
    expected = make(twin)
    for _ in range(5):
        before = flat(weights_of(model))
        step_once(private)
        gradient = flat({n: p.grad for n, p in private.model.named_parameters()})
        rate = twin.param_groups[0]["lr"]
        torch.testing.assert_close(before - flat(weights_of(model)), rate * gradient, rtol=1e-9, atol=1e-15)
        scheduler.step()
        twin.step()
        expected.step()
        assert private.optimizer.param_groups[0]["lr"] == twin.param_groups[0]["lr"] == scheduler.get_last_lr()[0]


def test_a_plateau_scheduler_lowers_the_rate() -> None:
    private = small_run()
    scheduler = lr_scheduler.ReduceLROnPlateau(private.optimizer, patience=0)
    for loss in (1.0, 1.0, 1.0):
        step_once(private)
        scheduler.step(loss)
    assert private.optimizer.inner.param_groups[0]["lr"] < LR


def test_a_rate_set_by_hand_is_used_at_once() -> None:
    private = small_run(optimizer=lambda p: torch.optim.SGD(p, lr=LR))
    private.optimizer.param_groups[0]["lr"] = 0.0
    before = weights_of(private.model)
    step_once(private)
    assert same(before, weights_of(private.model))
    private.optimizer.param_groups[0]["lr"] = 1.0
    step_once(private)
    assert not same(before, weights_of(private.model))


def test_groups_keep_their_own_rates() -> None:
    private = small_run(
        optimizer=lambda p: torch.optim.SGD(
            [{"params": group, "lr": rate} for group, rate in zip(pairs(list(p)), (0.0, 0.3), strict=True)]
        )
    )
    before = weights_of(private.model)
    step_once(private)
    after = weights_of(private.model)
    for name, gradient in ((n, p.grad) for n, p in private.model.named_parameters()):
        rate = 0.0 if name.startswith("0.") else 0.3
        torch.testing.assert_close(before[name] - after[name], rate * gradient, rtol=1e-9, atol=1e-15)


def pairs(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    return [parameters[:2], parameters[2:]]


# ── which parameters move ───────────────────────────────────────────────────────────────────────────


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 4)
        self.head = nn.Linear(4, CLASSES)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


def moved(private: dpdl.Private, before: dict[str, Tensor]) -> set[str]:
    """The parts whose weights are not what they were."""
    return {n.split(".")[0] for n, t in weights_of(private.model).items() if not torch.equal(before[n], t)}


@pytest.mark.parametrize("physical", [None, 5])
def test_an_unused_parameter_moves_by_noise(physical: int | None) -> None:
    private = small_run(Parts().double(), noise_multiplier=1.0, max_physical_batch_size=physical)
    before = weights_of(private.model)
    step_once(private)
    assert moved(private, before) == {"body", "head", "unused"}


def test_what_the_optimizer_does_not_hold_stays_and_does_not_enter_the_norm() -> None:
    model = Parts().double()
    expected = plain_gradient(model, lambda m: F.cross_entropy(m(X), Y))
    private = small_run(model, optimizer=lambda _: torch.optim.SGD(model.head.parameters(), lr=LR), max_grad_norm=1e9)
    before = weights_of(model)
    step_once(private)
    assert moved(private, before) == {"head"}
    assert set(released(private)) == {"head.weight", "head.bias"}
    torch.testing.assert_close(released(private)["head.weight"], expected["head.weight"])


def test_frozen_then_thawed_then_frozen_again() -> None:
    """Gradual unfreezing: the optimizer holds everything from the start."""
    model = Parts().double()
    model.body.requires_grad_(False)
    private = small_run(model, noise_multiplier=1.0)
    seen = []
    for frozen in (True, False, True):
        model.body.requires_grad_(not frozen)
        before = weights_of(model)
        step_once(private)
        seen.append("body" in moved(private, before))
    assert seen[0] is False
    assert seen[1] is True


@pytest.mark.parametrize("zero_grad", [True, False])
def test_a_parameter_frozen_after_it_was_trained_stays_where_it_is(zero_grad: bool) -> None:
    """Without momentum or decay, as in plain torch after zero_grad."""
    model = Parts().double()
    private = small_run(model, optimizer=lambda p: torch.optim.SGD(p, lr=LR), noise_multiplier=1.0)
    step_once(private)
    model.body.requires_grad_(False)
    before = weights_of(model)
    x, y = next(iter(private.loader))
    if zero_grad:
        private.optimizer.zero_grad()
    F.cross_entropy(private.model(x), y).backward()
    private.optimizer.step()
    assert moved(private, before) == {"head", "unused"}


def test_what_thaws_between_forward_and_step_gets_noise() -> None:
    model = Parts().double()
    model.body.requires_grad_(False)
    private = small_run(model, noise_multiplier=1.0)
    x, y = next(iter(private.loader))
    loss = F.cross_entropy(private.model(x), y)
    model.body.requires_grad_(True)
    loss.backward()
    private.optimizer.step()
    assert private.model.body.weight.grad.abs().sum() > 0


# ── habits ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("habit", ["before forward", "before backward", "not at all", "model.zero_grad", "to zero"])
def test_gradients_may_be_zeroed_where_one_likes(habit: str) -> None:
    usual, other = small_run(steps=3), small_run(steps=3)
    for _ in range(3):
        step_once(usual)
        x, y = next(iter(other.loader))
        if habit == "before forward":
            other.optimizer.zero_grad()
        elif habit == "to zero":
            other.optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(other.model(x), y)
        if habit == "before backward":
            other.optimizer.zero_grad()
        elif habit == "model.zero_grad":
            other.model.zero_grad()
        loss.backward()
        other.optimizer.step()
    assert same(weights_of(usual.model), weights_of(other.model))


def test_zeroing_in_the_middle_of_a_logical_batch_loses_nothing() -> None:
    zeroing, plain = (small_run(max_physical_batch_size=5) for _ in range(2))
    for private in (zeroing, plain):
        for x, y in private.loader:
            loss = F.cross_entropy(private.model(x), y)
            if private is zeroing:
                private.optimizer.zero_grad()
            loss.backward()
            private.optimizer.step()
            if private is zeroing and private.optimizer.steps_taken == 0:
                private.optimizer.zero_grad()
    assert same(released(zeroing), released(plain))


def test_zeros_left_from_before_are_no_foreign_gradients() -> None:
    """Pretraining, then zero_grad(set_to_none=False) as ever: the refusal's remedy would never help."""
    model = network()
    F.cross_entropy(model(X), Y).backward()
    model.zero_grad(set_to_none=False)
    private = small_run(model)
    x, y = next(iter(private.loader))
    private.optimizer.zero_grad(set_to_none=False)
    F.cross_entropy(private.model(x), y).backward()
    private.optimizer.step()
    assert private.optimizer.steps_taken == 1


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    private, usual = small_run(), small_run()
    step_once(usual)
    calls = []
    for x, y in private.loader:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            private.optimizer.zero_grad()
            loss = F.cross_entropy(private.model(x), y)
            loss.backward()
            calls.append(float(loss.detach()))
            return loss

        returned = private.optimizer.step(closure)
        assert float(returned) == calls[0]
    assert len(calls) == 1
    assert same(weights_of(private.model), weights_of(usual.model))


def test_a_closure_that_raises_leaves_the_batch_open() -> None:
    private = small_run()
    batch = next(iter(private.loader))

    def closure() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        private.optimizer.step(closure)
    assert private.optimizer.steps_taken == 0
    train_on(private, batch)


def test_clipping_after_backward_sees_no_gradient_and_after_the_step_only_the_noisy_one() -> None:
    private = small_run(noise_multiplier=1.0)
    x, y = next(iter(private.loader))
    F.cross_entropy(private.model(x), y).backward()
    assert nn.utils.clip_grad_norm_(private.model.parameters(), 1.0) == 0
    private.optimizer.step()
    assert nn.utils.clip_grad_norm_(private.model.parameters(), 1e-9) > 0
    step_once(private)


def test_step_hooks_of_the_user_run_once_a_call() -> None:
    private = small_run()
    seen: list[str] = []
    private.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    private.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    step_once(private)
    assert seen == ["before", "after"]


def test_an_interrupted_loop_goes_on_with_a_new_pass() -> None:
    private = small_run(batch_size=4, steps=20, noise_multiplier=1.0)

    def loop(stop_after: int) -> None:
        for number, (x, y) in enumerate(private.loader):
            loss = F.cross_entropy(private.model(x), y)
            if number == stop_after:
                raise KeyboardInterrupt
            loss.backward()
            private.optimizer.step()

    for stop_after in (0, 1, 2):
        with contextlib.suppress(KeyboardInterrupt):
            loop(stop_after)
    assert private.optimizer.steps_taken == 0 + 1 + 2
    loop(stop_after=99)
    assert private.optimizer.steps_taken == 3 + 3


def test_a_loop_in_another_thread_is_a_loop() -> None:
    private, usual = small_run(noise_multiplier=1.0), small_run(noise_multiplier=1.0)
    worker = threading.Thread(target=step_once, args=(private,))
    worker.start()
    worker.join()
    step_once(usual)
    assert same(weights_of(private.model), weights_of(usual.model))


def test_batches_may_be_used_as_ordinary_tensors() -> None:
    private = small_run(steps=6)
    for _ in range(6):
        x, y = next(iter(private.loader))
        assert x.numpy().shape == (12, FEATURES)
        assert y.tolist() == Y.tolist()
        assert pickle.loads(pickle.dumps(y)).shape == y.shape
        assert torch.equal(copy.deepcopy(x), x)
        assert {int(label) for label in y} == {0, 1}
        assert F.one_hot(y, CLASSES).sum() == 12
        train_on(private, (x.to("cpu", non_blocking=True).contiguous(), y.long()))


def test_outputs_may_be_used_as_ordinary_tensors() -> None:
    private = small_run()
    x, y = next(iter(private.loader))
    output = private.model(x)
    assert output.detach().numpy().shape == (12, CLASSES)
    assert 0 <= float((output.argmax(1) == y).float().mean()) <= 1
    assert f"{F.cross_entropy(output, y).item():.3f}"
    assert output.detach().cpu().tolist()
    F.cross_entropy(output, y).backward()
    private.optimizer.step()


# ── states and extremes ─────────────────────────────────────────────────────────────────────────────


def test_settings_restored_into_the_wrapped_optimizer_are_the_ones_that_schedulers_move() -> None:
    private = small_run()
    private.optimizer.inner.load_state_dict(private.optimizer.inner.state_dict())
    private.optimizer.param_groups[0]["lr"] = 0.0
    assert private.optimizer.inner.param_groups[0]["lr"] == 0.0


def test_a_state_of_a_plain_optimizer_is_refused() -> None:
    private = small_run()
    with refused(private, PrivacyError, "no ledger", "PrivateOptimizer.state_dict()"):
        private.optimizer.load_state_dict(torch.optim.SGD(network().parameters(), lr=0.1).state_dict())


def test_an_unbounded_clip_without_noise_trains() -> None:
    private = small_run(max_grad_norm=float("inf"))
    expected = plain_gradient(private.model.module, lambda m: F.cross_entropy(m(X), Y))
    step_once(private)
    torch.testing.assert_close(released(private), expected)


def test_enormous_noise_is_still_finite_noise() -> None:
    private = small_run(noise_multiplier=1e20)
    step_once(private)
    assert all(torch.isfinite(p).all() for p in private.model.parameters())


def test_a_plan_without_steps_refuses_the_first() -> None:
    private = small_run(steps=0)
    with refused(private, PlanExhaustedError, "0 steps"):
        iter(private.loader)
    with refused(private, StepError):
        private.optimizer.step()


def test_labels_may_be_anything_that_the_loss_takes() -> None:
    dataset = TensorDataset(X, torch.rand(12, CLASSES, dtype=X.dtype))
    private = small_run(dataset=dataset)
    step_once(private)
    assert private.optimizer.steps_taken == 1
