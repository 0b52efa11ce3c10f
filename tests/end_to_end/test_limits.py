"""Private training with nothing clipped and no noise is plain training, step by step, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler, StepLR

import dpdl
from tests.end_to_end.recorded_run import Record, numbered_loader, train
from tests.oracles import one_at_a_time
from tests.oracles.plain_training import replay, weights_of, worst_difference
from tests.per_sample.case import ENGINES, cross_entropy_sum, normal, tokens

EXAMPLES, EXPECTED, STEPS = 30, 8, 20
PASS = math.ceil(EXAMPLES / EXPECTED)  # 4 logical batches, 5 passes
# Only the order of additions differs: about 1e-15 a step, more through Adam's division.
TOLERANCE = 1e-9

X = normal(EXAMPLES, 1, 5, 5, seed=81)
Y = tokens(EXAMPLES, vocabulary=3, seed=82)

MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "momentum_and_decay": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


each_engine = pytest.mark.parametrize("engine", ENGINES)
each_physical = pytest.mark.parametrize("physical", [None, 3, 1], ids=["whole", "threes", "ones"])


def halving(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return StepLR(optimizer, step_size=1, gamma=0.5)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(83)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 5), nn.Tanh(), nn.Linear(5, 3)
        ).double()


def private_run(
    *,
    optimizer: str = "sgd",
    engine: str = "auto",
    physical: int | None = None,
    expected: int = EXPECTED,
    max_grad_norm: float = math.inf,
    loss_fn: Callable[..., torch.Tensor] = F.cross_entropy,
    loss_reduction: str = "mean",
    make_scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    steps: int = STEPS,
) -> Record:
    model = network()
    plan = dpdl.PrivacyPlan(
        sample_rate=expected / EXAMPLES,
        expected_batch_size=expected,
        steps=steps,
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
    )
    private = dpdl.make_private(
        model,
        OPTIMIZERS[optimizer](list(model.parameters())),
        numbered_loader(X, Y, batch_size=expected),
        plan,
        execution=dpdl.Execution(
            engine=engine,
            max_physical_batch_size=physical,
            accumulate_dtype=torch.float64,
            loss_reduction=loss_reduction,
            insecure_seed=84,
        ),
    )
    scheduler = None if make_scheduler is None else make_scheduler(private.optimizer)
    return train(private, loss_fn, steps=steps, scheduler=scheduler)


@each_physical
@each_engine
def test_full_batches_give_the_textbook_loop(engine: str, physical: int | None) -> None:
    record = private_run(engine=engine, physical=physical, expected=EXAMPLES)
    model = network()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    textbook = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        textbook.append(weights_of(model))
    assert worst_difference(record.weights, textbook) <= TOLERANCE
    assert record.passes == [1] * STEPS
    assert all(sorted(batch.tolist()) == list(range(EXAMPLES)) for batch in record.batches)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@each_physical
@each_engine
def test_sampled_batches_give_plain_training_on_the_same_batches(
    engine: str, physical: int | None, optimizer: str
) -> None:
    record = private_run(engine=engine, physical=physical, optimizer=optimizer, make_scheduler=halving)
    plain = replay(
        network(),
        OPTIMIZERS[optimizer],
        cross_entropy_sum,
        (X, Y),
        record.batches,
        expected_batch_size=EXPECTED,
        make_scheduler=halving,
        batches_per_pass=PASS,
    )
    assert worst_difference(record.weights, plain) <= TOLERANCE
    assert record.passes == [PASS] * (STEPS // PASS)


def test_the_comparison_notices_a_batch_off_by_one_example() -> None:
    record = private_run()
    tampered = [*record.batches[:-1], record.batches[-1][:-1]]
    plain = replay(network(), OPTIMIZERS["sgd"], cross_entropy_sum, (X, Y), tampered, expected_batch_size=EXPECTED)
    assert worst_difference(record.weights, plain) > 1e3 * TOLERANCE


def test_the_comparison_notices_an_average_over_the_realised_size() -> None:
    record = private_run()
    model = network()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    realised = []
    for rows in record.batches:
        optimizer.zero_grad()
        F.cross_entropy(model(X[rows]), Y[rows]).backward()
        optimizer.step()
        realised.append(weights_of(model))
    assert worst_difference(record.weights, realised) > 1e3 * TOLERANCE


@each_physical
@each_engine
def test_a_summed_loss_gives_plain_training_too(engine: str, physical: int | None) -> None:
    record = private_run(
        engine=engine, physical=physical, loss_fn=cross_entropy_sum, loss_reduction="sum", optimizer="adam"
    )
    plain = replay(
        network(), OPTIMIZERS["adam"], cross_entropy_sum, (X, Y), record.batches, expected_batch_size=EXPECTED
    )
    assert worst_difference(record.weights, plain) <= TOLERANCE


def test_poisson_batches_vary_in_size_and_repeat_no_example_within_one() -> None:
    batches = private_run().batches
    assert len({len(batch) for batch in batches}) > 1
    assert all(len(set(batch.tolist())) == len(batch) for batch in batches)


@pytest.mark.parametrize("physical", [1, 3, 7])
def test_parts_are_no_larger_than_asked_for_and_no_more_than_needed(physical: int) -> None:
    record = private_run(physical=physical)
    for rows, parts in zip(record.batches, record.parts, strict=True):
        assert max(parts) <= physical
        assert len(parts) == max(1, math.ceil(len(rows) / physical))


@each_physical
@each_engine
def test_without_noise_a_step_is_the_clipped_sum_over_the_expected_size(engine: str, physical: int | None) -> None:
    model = network()
    gradients = one_at_a_time.per_sample_gradients(model, F.cross_entropy, X, Y)
    max_grad_norm = float(one_at_a_time.norms_of(gradients).median())
    record = private_run(engine=engine, physical=physical, max_grad_norm=max_grad_norm, steps=5)
    states = [weights_of(model), *record.weights]
    for state, rows, released in zip(states, record.batches, record.released, strict=False):
        at_this_step = copy.deepcopy(model)
        at_this_step.load_state_dict(state)
        true = one_at_a_time.clipped_sum_of(
            one_at_a_time.per_sample_gradients(at_this_step, F.cross_entropy, X[rows], Y[rows]),
            max_grad_norm,
        )
        measured = {name: gradient * EXPECTED for name, gradient in released.items()}
        error, name = one_at_a_time.worst_error(measured, true)
        assert error <= TOLERANCE, (name, error)


def test_without_noise_epsilon_is_infinite() -> None:
    model = network()
    plan = dpdl.PrivacyPlan(
        sample_rate=1.0, expected_batch_size=EXAMPLES, steps=2, noise_multiplier=0.0, max_grad_norm=1.0
    )
    private = dpdl.make_private(
        model, OPTIMIZERS["sgd"](list(model.parameters())), numbered_loader(X, Y, batch_size=EXAMPLES), plan
    )
    train(private, F.cross_entropy, steps=1)
    assert private.optimizer.epsilon(1e-5) == math.inf
