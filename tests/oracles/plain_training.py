"""Training without privacy on batches that someone else chose: what a private run has to reduce to.

Gradient of a step: sum over the batch's examples / expected_batch_size, by plain autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

Weights = dict[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    """A copy of a model's parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def replay(
    model: nn.Module,
    make_optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
    loss_sum: Callable[[Tensor, Tensor], Tensor],
    data: tuple[Tensor, Tensor],
    batches: Sequence[Tensor],
    *,
    expected_batch_size: float,
    make_scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    batches_per_pass: int = 1,
) -> list[Weights]:
    """The weights after each batch.

    Args:
        model: Where to start; it is copied.
        loss_sum: The loss, summed over a batch's examples.
        data: All inputs and targets, [n, ...].
        batches: Which rows of `data` each step uses.
        make_scheduler: Its `step` is called after every `batches_per_pass` batches.
    """
    model = copy.deepcopy(model)
    optimizer = make_optimizer(list(model.parameters()))
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    history = []
    for number, rows in enumerate(batches, start=1):
        optimizer.zero_grad()
        (loss_sum(model(data[0][rows]), data[1][rows]) / expected_batch_size).backward()
        optimizer.step()
        history.append(weights_of(model))
        if scheduler is not None and number % batches_per_pass == 0:
            scheduler.step()
    return history


def worst_difference(left: Sequence[Weights], right: Sequence[Weights]) -> float:
    """Largest relative L2 difference of any parameter after any step."""
    assert len(left) == len(right), (len(left), len(right))
    worst = 0.0
    for one, other in zip(left, right, strict=True):
        assert set(one) == set(other)
        for name, value in other.items():
            worst = max(worst, float((one[name] - value).norm() / value.norm().clamp(min=1e-12)))
    return worst
