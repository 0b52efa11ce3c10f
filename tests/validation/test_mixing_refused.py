"""A run whose model mixes examples or keeps state never takes a step."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dpdl.errors import ExampleMixingError, ModelError
from tests.small_run import FEATURES, N, examples, refused, same, sgd, small_run, train_on, weights_of
from tests.validation.mixers import (
    BATCH_NORMS,
    KEEPERS,
    MIXERS,
    CentredOverBatch,
    ReassignedBuffer,
    RunningMeanInAttribute,
    model_with,
)
from tests.validation.test_check import WRITERS

X, Y = examples()
each_engine = pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])


def without_momentum(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_normalisation_is_refused_when_wrapping(name: str) -> None:
    model = model_with(BATCH_NORMS[name]())
    before = weights_of(model)
    optimizer = sgd(model.parameters())
    with pytest.raises(ExampleMixingError, match=r"'body\.bad'.*GroupNorm") as caught:
        small_run(model, optimizer=lambda _: optimizer)
    assert "eval()" in str(caught.value)
    assert same(before, weights_of(model))
    optimizer.step()  # the refusal left the optimizer usable without privacy


def test_every_batch_normalisation_is_named() -> None:
    model = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Sequential(nn.BatchNorm1d(FEATURES)), nn.Linear(FEATURES, 2))
    with pytest.raises(ExampleMixingError) as caught:
        small_run(model.double())
    assert "'0'" in str(caught.value)
    assert "'1.0'" in str(caught.value)


def test_frozen_batch_normalisation_trains_and_its_statistics_stay() -> None:
    model = model_with(nn.BatchNorm1d(FEATURES))
    model.body.bad.eval().requires_grad_(False)
    private = small_run(model, noise_multiplier=1.0)
    before = weights_of(model)
    train_on(private, next(iter(private.loader)))
    after = weights_of(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"body.first.weight", "body.first.bias", "body.last.weight", "body.last.bias"}


def test_batch_normalisation_cannot_be_switched_to_training_in_mid_run() -> None:
    model = model_with(nn.BatchNorm1d(FEATURES).eval())
    private = small_run(model)
    with refused(private, ExampleMixingError, "'body.bad'", "keep it in eval()"):
        private.model.train()
    assert not model.body.bad.training
    train_on(private, next(iter(private.loader)))


def test_batch_normalisation_switched_behind_the_wrapper_is_refused_at_the_next_batch() -> None:
    model = model_with(nn.BatchNorm1d(FEATURES).eval())
    private = small_run(model)
    train_on(private, next(iter(private.loader)))
    x, y = next(iter(private.loader))
    model.train()
    with refused(private, ExampleMixingError, "'body.bad'"):
        private.model(x)
    model.body.bad.eval()
    train_on(private, (x, y))


@each_engine
@pytest.mark.parametrize("name", MIXERS)
def test_what_mixes_is_refused_at_the_first_batch(name: str, engine: str) -> None:
    private = small_run(model_with(MIXERS[name]()), engine=engine)
    x, _ = next(iter(private.loader))
    with refused(private, ExampleMixingError, "'body.bad", "within one example"):
        private.model(x)


@each_engine
@pytest.mark.parametrize("name", KEEPERS)
def test_what_keeps_state_is_refused_at_the_first_batch(name: str, engine: str) -> None:
    private = small_run(model_with(KEEPERS[name]()), engine=engine)
    x, _ = next(iter(private.loader))
    with refused(private, ExampleMixingError, "body.bad", "un-noised"):
        private.model(x)


@each_engine
@pytest.mark.parametrize("name", KEEPERS)
def test_what_keeps_state_is_refused_without_the_self_check_too(name: str, engine: str) -> None:
    private = small_run(model_with(KEEPERS[name]()), engine=engine, self_check=False)
    x, _ = next(iter(private.loader))
    with refused(private, ModelError, "buffers"):
        private.model(x)


# Not among them: the loop engine, unchecked, on a module that hands values on in a Python attribute. Nothing but
# the check can see that.
UNCHECKED = [
    (kind, execution, engine)
    for kind in (CentredOverBatch, RunningMeanInAttribute)
    for execution in ({"self_check": False}, {"max_physical_batch_size": 1})
    for engine in ("auto", "vmap", "loop")
    if not (kind is RunningMeanInAttribute and engine == "loop" and "self_check" in execution)
]


@pytest.mark.parametrize(("kind", "execution", "engine"), UNCHECKED, ids=str)
def test_where_the_model_cannot_be_checked_examples_still_do_not_meet(
    kind: type[nn.Module], execution: dict[str, Any], engine: str
) -> None:
    """One example exchanged moves the release by at most 2 C, or the model is refused."""
    bound, steps = 1e-3, 2  # the first step is for a model that notices only when it is called again
    releases = []
    for first in (X[0], 50 * X[0]):
        dataset = TensorDataset(torch.cat([first.unsqueeze(0), X[1:]]), Y)
        private = small_run(model_with(kind()), dataset=dataset, engine=engine, max_grad_norm=bound, **execution)
        try:
            for _ in range(steps):
                for batch in private.loader:
                    train_on(private, batch)
        except ModelError:
            return
        releases.append(torch.cat([p.grad.flatten() * N for p in private.model.parameters()]))
        private.model.zero_grad()
    # The weights after the first step differ by at most 2 C / N: far less than a crossing shows.
    assert (releases[0] - releases[1]).norm() <= 2.2 * bound


@each_engine
@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("name", WRITERS)
def test_a_forward_that_writes_to_its_parameters_leaves_no_data_in_them(
    name: str, self_check: bool, engine: str
) -> None:
    """With learning rate 0 the only thing that can move a weight is the forward itself."""
    build, inputs = WRITERS[name]
    private = small_run(
        build(),
        dataset=TensorDataset(inputs, Y[: len(inputs)]),
        batch_size=len(inputs),
        optimizer=without_momentum,
        engine=engine,
        self_check=self_check,
    )
    before = weights_of(private.model)
    for x, y in private.loader:
        try:
            F.cross_entropy(private.model(x), y).backward()
            private.optimizer.step()
        except ModelError:
            break
    assert same(before, weights_of(private.model)), "the forward wrote un-noised data into the weights"


@each_engine
def test_a_buffer_that_forward_replaces_keeps_no_data(engine: str) -> None:
    private = small_run(model_with(ReassignedBuffer()), engine=engine, self_check=False)
    x, y = next(iter(private.loader))
    with contextlib.suppress(ModelError):
        train_on(private, (x, y))
    assert private.model.module.body.bad.seen.abs().sum() == 0


@pytest.mark.parametrize("kind", [*KEEPERS.values(), ReassignedBuffer])
def test_evaluating_in_training_mode_writes_no_statistics_of_private_data(kind: type[nn.Module]) -> None:
    model = model_with(kind())
    private = small_run(model)
    before = weights_of(model)
    with torch.no_grad():
        private.model(X)
    assert same(before, weights_of(model))
