"""One training step, ready to be called: plain, private through `dpdl.make_private`, and the floors beside it.

A step is zero_grad, forward, loss, backward, and `optimizer.step()`, which for a private one clips, adds noise
and updates. Batches are of fixed size, so that all steps of a model do the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import dpdl
from benchmarks.engine_models import Case
from dpdl.execution import EngineName
from dpdl.noise import gaussian_mechanism
from dpdl.secure_random import RandomStream
from dpdl.types import ClippedSum

__all__ = ["LEARNING_RATE", "MAX_GRAD_NORM", "NOISE_MULTIPLIER", "Step", "floor", "noise_alone", "plain", "private"]

NOISE_MULTIPLIER = 1.0
MAX_GRAD_NORM = 1.0
LEARNING_RATE = 0.01
MANY_STEPS = 100_000  # more than any measurement takes


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that can be taken again and again.

    Attributes:
        run: take it.
        module: the model that it trains.
        batch: what it trains on.
        engine: which engine computes, once a step was taken; None where there is none to choose.
    """

    run: Callable[[], None]
    module: nn.Module
    batch: tuple[Tensor, Tensor]
    engine: Callable[[], str | None] = lambda: None


def plain(case: Case, size: int) -> Step:
    """The step without privacy."""
    module, (inputs, targets) = case.build(), case.batch(size)
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)

    def run() -> None:
        optimizer.zero_grad()
        case.loss(module(inputs), targets).backward()
        optimizer.step()

    return Step(run=run, module=module, batch=(inputs, targets))


def floor(case: Case, size: int) -> Step:
    """The plain step and one `torch.randn` a parameter: no private step can be expected below it."""
    module, (inputs, targets) = case.build(), case.batch(size)
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)

    def run() -> None:
        optimizer.zero_grad()
        case.loss(module(inputs), targets).backward()
        for p in module.parameters():
            assert p.grad is not None
            p.grad.add_(torch.randn(p.shape), alpha=NOISE_MULTIPLIER * MAX_GRAD_NORM / size)
        optimizer.step()

    return Step(run=run, module=module, batch=(inputs, targets))


def noise_alone(case: Case, size: int) -> Step:
    """The secure noise of a private step, and nothing else of it."""
    module = case.build()
    clipped = ClippedSum(
        tensors={name: torch.zeros_like(p, requires_grad=False) for name, p in module.named_parameters()},
        sensitivity=MAX_GRAD_NORM,
        examples=size,
        clipped=0,
        non_finite=0,
    )
    stream = RandomStream.from_os()
    steps = iter(range(MANY_STEPS))

    def run() -> None:
        gaussian_mechanism(clipped, noise_multiplier=NOISE_MULTIPLIER, stream=stream, step=next(steps))

    return Step(run=run, module=module, batch=case.batch(size))


def private(case: Case, size: int, *, engine: EngineName, chunk_size: int | None = None) -> Step:
    """A private step through the public interface, as a training loop takes it."""
    execution = dpdl.Execution(engine=engine, chunk_size=chunk_size)
    module, (inputs, targets) = case.build(), case.batch(size)
    # Sample rate 1: every batch is the whole of the data.
    plan = dpdl.PrivacyPlan(
        sample_rate=1.0,
        expected_batch_size=size,
        steps=MANY_STEPS,
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=MAX_GRAD_NORM,
    )
    # The data stands in the loader once, and is not collated example by example: loading is not measured.
    loader = DataLoader(_Whole(inputs, targets), batch_size=size, collate_fn=lambda copies: copies[0])
    model, optimizer, batches = dpdl.make_private(
        module, torch.optim.SGD(module.parameters(), lr=LEARNING_RATE), loader, plan, execution=execution
    )

    def endless() -> Iterator[Any]:
        while True:
            yield from batches

    source = endless()

    def run() -> None:
        x, y = next(source)
        optimizer.zero_grad()
        case.loss(model(x), y).backward()
        optimizer.step()

    return Step(run=run, module=module, batch=(inputs, targets), engine=lambda: model.engine_name)


class _Whole(Dataset[tuple[Tensor, Tensor]]):
    """As many examples as the batch has, each of which is the whole batch."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs, self.targets
