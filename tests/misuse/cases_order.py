"""Calls out of order: steps, backwards and batches that do not belong together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from dpdl.errors import LoaderError, PlanExhaustedError, StepError, WrapError
from tests.misuse.case import Trial, misuse
from tests.small_run import (
    N,
    examples,
    network,
    released,
    same,
    small_run,
    step_once,
    train_on,
    weights_of,
)

X, Y = examples()
ORDER = "Order of calls"


def forward(private: dpdl.Private) -> Tensor:
    """A loss of a fresh batch."""
    x, y = next(iter(private.loader))
    return F.cross_entropy(private.model(x), y)


def plain(tensor: Tensor) -> Tensor:
    """As if it had never come from the private loader."""
    return tensor.detach().clone().as_subclass(Tensor)


@misuse(ORDER, tried="a step before the loader is iterated", refused=StepError)
def step_without_a_batch(trial: Trial) -> None:
    private = small_run()
    with trial.refused(private):
        private.optimizer.step()


@misuse(ORDER, tried="step() after a forward without backward()", refused=StepError)
def step_without_backward(trial: Trial) -> None:
    private = small_run()
    forward(private)
    with trial.refused(private):
        private.optimizer.step()


@misuse(ORDER, tried="two steps on one batch", refused=StepError)
def second_step_on_one_batch(trial: Trial) -> None:
    private = small_run()
    train_on(private, next(iter(private.loader)))
    with trial.refused(private):
        private.optimizer.step()


@misuse(
    ORDER,
    tried="zero_grad() between backward() and step()",
    refused=StepError,
)
def zero_grad_after_backward(trial: Trial) -> None:
    private = small_run()
    forward(private).backward()
    private.optimizer.zero_grad()
    with trial.refused(private):
        private.optimizer.step()


@misuse(
    ORDER,
    tried="never calling zero_grad()",
    peer="deepee (D1): gradients of all earlier steps are added in; Opacus: an error about BatchMemoryManager",
    harmless="each step starts anew; the weights are those of a loop with zero_grad()",
)
def no_zero_grad_at_all(trial: Trial) -> None:
    without, with_it = small_run(noise_multiplier=1.0), small_run(noise_multiplier=1.0)
    for private in (without, with_it):
        for x, y in private.loader:
            if private is with_it:
                private.optimizer.zero_grad()
            F.cross_entropy(private.model(x), y).backward()
            private.optimizer.step()
    assert same(weights_of(without.model), weights_of(with_it.model))


@misuse(
    ORDER,
    tried="accumulating over two batches of the loader before one step",
    peer="fastDP: noise is added to the first part only",
    refused=StepError,
)
def accumulating_over_batches(trial: Trial) -> None:
    private = small_run(batch_size=4)
    batches = iter(private.loader)
    x, y = next(batches)
    F.cross_entropy(private.model(x), y).backward()
    with trial.refused(private, saying="max_physical_batch_size"):
        next(batches)


@misuse(ORDER, tried="skipping a batch (`continue`) because its loss looks bad", refused=StepError)
def skipping_a_batch(trial: Trial) -> None:
    private = small_run(batch_size=4)
    batches = iter(private.loader)
    next(batches)
    with trial.refused(private):
        next(batches)


@misuse(ORDER, tried="one loss over an earlier batch and this one", refused=StepError)
def loss_over_two_batches(trial: Trial) -> None:
    private = small_run()
    x, y = next(iter(private.loader))
    kept = F.cross_entropy(private.model(x), y)
    x, y = next(iter(private.loader))
    both = kept + F.cross_entropy(private.model(x), y)
    with trial.refused(private):
        both.backward()


@misuse(ORDER, tried="backward() again after the step (retain_graph)", refused=StepError)
def backward_after_the_step(trial: Trial) -> None:
    private = small_run()
    loss = forward(private)
    loss.backward(retain_graph=True)
    private.optimizer.step()
    with trial.refused(private):
        loss.backward()


@misuse(
    ORDER,
    tried="two backwards of one batch before the step",
    peer="Opacus: ValueError 'use BatchMemoryManager'",
    harmless="both are added up for each example and clipped once: the sum stays within the clipping norm",
)
def two_backwards_of_one_batch(trial: Trial) -> None:
    private = small_run(max_grad_norm=1e-3)
    loss = forward(private)
    loss.backward(retain_graph=True)
    loss.backward()
    private.optimizer.step()
    norm = torch.cat([g.flatten() for g in released(private).values()]).norm()
    assert private.optimizer.diagnostics.clipped == N
    assert 0 < norm <= N * 1e-3


@misuse(
    ORDER,
    tried="break in the middle of a logical batch, then a new pass",
    peer="Opacus: the partial sum leaks into the next batch, norm 0.0050 against a bound of 0.0040",
    harmless="the part is dropped; the next release is that of an undisturbed run",
)
def break_in_a_logical_batch(trial: Trial) -> None:
    broken, whole = small_run(max_physical_batch_size=5), small_run(max_physical_batch_size=5)
    train_on(broken, next(iter(broken.loader)))
    assert broken.optimizer.steps_taken == 0
    step_once(broken)
    step_once(whole)
    assert same(released(broken), released(whole))


@misuse(ORDER, tried="steps past the plan", refused=PlanExhaustedError)
def steps_past_the_plan(trial: Trial) -> None:
    private = small_run(steps=1)
    step_once(private)
    with trial.refused(private):
        iter(private.loader)


@misuse(ORDER, tried="two iterators over the private loader at once", refused=StepError)
def two_iterators(trial: Trial) -> None:
    private = small_run(batch_size=4)
    first, second = iter(private.loader), iter(private.loader)
    next(second)
    with trial.refused(private):
        next(first)


@misuse(
    ORDER,
    tried="step(closure)",
    peer="Opacus: returns None",
    harmless="the closure's loss is returned, and the release is that of the plain loop",
)
def step_with_a_closure(trial: Trial) -> None:
    by_closure, by_loop = small_run(), small_run()
    x, y = next(iter(by_closure.loader))

    def closure() -> float:
        loss = F.cross_entropy(by_closure.model(x), y)
        loss.backward()
        return float(loss)

    assert abs(by_closure.optimizer.step(closure) - float(F.cross_entropy(network()(X), Y))) < 1e-9
    step_once(by_loop)
    assert same(released(by_closure), released(by_loop))


@misuse(ORDER, tried="LBFGS", peer="Opacus: fails inside", refused=WrapError)
def lbfgs(trial: Trial) -> None:
    model = network()
    with trial.refused(model):
        small_run(model, optimizer=lambda p: torch.optim.LBFGS(list(p)))


@misuse(
    ORDER,
    tried="make_private on what is private already",
    peer="Opacus: 'Trying to add hooks twice'",
    refused=WrapError,
)
def make_private_twice(trial: Trial) -> None:
    private = small_run()
    with trial.refused(private):
        dpdl.make_private(private.model, private.optimizer, DataLoader(TensorDataset(X, Y), N), private.optimizer.plan)


@misuse(ORDER, tried="planning for the private loader", refused=LoaderError)
def a_plan_for_the_private_loader(trial: Trial) -> None:
    private = small_run()
    with trial.refused(private):
        dpdl.PrivacyPlan.for_loader(private.loader, steps=1, noise_multiplier=1.0, max_grad_norm=1.0)  # type: ignore[arg-type]
