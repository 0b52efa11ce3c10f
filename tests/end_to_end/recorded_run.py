"""The user's own loop round private objects, with a record of what could be seen from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from tests.oracles.plain_training import Weights, weights_of

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Record:
    """One entry a logical batch, except `passes`.

    Attributes:
        batches: The examples drawn, as row numbers of the dataset.
        parts: Sizes of the physical batches that it came in.
        released: `p.grad` after the step that ended it.
        weights: The parameters after that step.
        passes: Logical batches in each complete pass over the loader.
    """

    batches: list[Tensor] = field(default_factory=list)
    parts: list[list[int]] = field(default_factory=list)
    released: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[Weights] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)


def numbered_loader(x: Tensor, y: Tensor, *, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """A shuffled loader whose examples carry their own row number."""
    return DataLoader(TensorDataset(x, y, torch.arange(len(x))), batch_size=batch_size, shuffle=True)


def train(private: dpdl.Private, loss_fn: Loss, *, steps: int, scheduler: LRScheduler | None = None) -> Record:
    """Train for `steps` logical batches; the scheduler steps after each pass over the loader.

    A logical batch ends where `optimizer.step()` leaves gradients behind. Before that no part of it
    may have moved a weight.
    """
    model, optimizer, loader = private
    record = Record()
    rows: list[Tensor] = []
    before = weights_of(model)
    while len(record.batches) < steps:
        in_this_pass = 0
        for x, y, row in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()

            rows.append(row)
            released = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            after = weights_of(model)
            if not released:
                assert all(torch.equal(after[name], before[name]) for name in before), "moved mid-batch"
                continue
            record.batches.append(torch.cat(rows))
            record.parts.append([len(r) for r in rows])
            record.released.append(released)
            record.weights.append(after)
            before, rows = after, []
            in_this_pass += 1
            if len(record.batches) == steps:
                break
        assert in_this_pass > 0, "a pass over the loader without a single step"
        record.passes.append(in_this_pass)
        if scheduler is not None:
            scheduler.step()
    return record
