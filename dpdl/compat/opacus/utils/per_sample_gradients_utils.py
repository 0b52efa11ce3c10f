"""Whether per-sample gradients of a module are right, by taking each example alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dpdl.compat.opacus.errors import EmptyBatchError
from dpdl.compat.opacus.grad_sample.utils import wrap_model
from dpdl.compat.opacus.utils.module_utils import clone_module, trainable_parameters

__all__ = [
    "check_per_sample_gradients_are_correct",
    "clone_module",
    "compute_grad_samples_microbatch_and_opacus",
    "compute_microbatch_grad_sample",
    "compute_opacus_grad_sample",
    "get_grad_sample_modes",
    "is_batch_empty",
]


def is_batch_empty(batch: Any) -> bool:
    """Whether a batch, a tensor or several, has no numbers."""
    first = batch if isinstance(batch, Tensor) else batch[0]
    return bool(first.numel() == 0)


def get_grad_sample_modes(use_ew: bool = False) -> list[str]:
    """The modes to try; "ew" is among them with use_ew."""
    return ["hooks", "functorch", "ew"] if use_ew else ["hooks", "functorch"]


def compute_microbatch_grad_sample(
    x: Any,
    module: nn.Module,
    batch_first: bool = True,
    loss_reduction: str = "mean",
    chunk_method: Callable[[Any], Iterable[Any]] = iter,
) -> dict[str, Tensor]:
    """Gradients of each example alone, by plain autograd: parameter name to [N, *shape].

    Args:
        x: the batch.
        module: called with a batch of one at a time; the loss is the L1 distance of its output from 0.
        batch_first: whether examples are on the first axis, or on the second.
        loss_reduction: "mean" or "sum", over the output's numbers.
        chunk_method: how to go through the batch, example by example; examples that are tuples are the arguments.
    """
    one_at_a_time = copy.deepcopy(module)
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in trainable_parameters(one_at_a_time)}
    for example in chunk_method(x if batch_first or isinstance(x, list) else x.transpose(0, 1)):
        one_at_a_time.zero_grad()
        one = example if isinstance(example, tuple) else (example.unsqueeze(0 if batch_first else 1),)
        _distance(one_at_a_time(*one), loss_reduction).backward()
        for name, p in trainable_parameters(one_at_a_time):
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


def compute_opacus_grad_sample(
    x: Any,
    module: nn.Module,
    batch_first: bool = True,
    loss_reduction: str = "mean",
    grad_sample_mode: str = "hooks",
) -> dict[str, Tensor]:
    """The same gradients as a mode of this facade computes them: parameter name to [N, *shape].

    Args:
        x, module, batch_first, loss_reduction: as in `compute_microbatch_grad_sample`.
        grad_sample_mode: one of `get_grad_sample_modes`.
    """
    copied = copy.deepcopy(module)
    wrapped: Any = wrap_model(copied, grad_sample_mode, batch_first=batch_first, loss_reduction=loss_reduction)
    _distance(wrapped(*x) if isinstance(x, tuple) else wrapped(x), loss_reduction).backward()
    found: dict[str, Any] = {name: p for name, p in trainable_parameters(copied)}
    return {name: p.grad_sample.plain() for name, p in found.items()}


def compute_grad_samples_microbatch_and_opacus(
    x: Any,
    module: nn.Module,
    batch_first: bool = True,
    loss_reduction: str = "mean",
    grad_sample_mode: str = "hooks",
    chunk_method: Callable[[Any], Iterable[Any]] = iter,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both: of each example alone, and of a mode; parameter name to [N, *shape].

    Args:
        x, module, batch_first, loss_reduction, chunk_method: as in `compute_microbatch_grad_sample`.
        grad_sample_mode: one of `get_grad_sample_modes`.
    """
    alone = compute_microbatch_grad_sample(x, module, batch_first, loss_reduction, chunk_method)
    return alone, compute_opacus_grad_sample(x, module, batch_first, loss_reduction, grad_sample_mode)


def check_per_sample_gradients_are_correct(
    x: Any,
    module: nn.Module,
    *,
    batch_first: bool = True,
    atol: float = 10e-6,
    rtol: float = 10e-5,
    grad_sample_mode: str = "hooks",
) -> bool:
    """Whether a mode's gradients are those of each example alone, under a mean and under a sum.

    Args:
        x, module, batch_first: as in `compute_microbatch_grad_sample`.
        atol, rtol: how far they may be apart.
        grad_sample_mode: one of `get_grad_sample_modes`.

    Raises:
        EmptyBatchError: the batch is empty.
    """
    if is_batch_empty(x):
        raise EmptyBatchError("The batch is empty: give at least one example to compare.")
    for reduction in ("sum", "mean"):
        alone, together = compute_grad_samples_microbatch_and_opacus(
            x, module, batch_first, reduction, grad_sample_mode
        )
        if not all(torch.allclose(alone[name], together[name], atol=atol, rtol=rtol) for name in alone):
            return False
    return True


def _distance(output: Tensor, loss_reduction: str) -> Tensor:
    distance = output.abs()
    return distance.mean() if loss_reduction == "mean" else distance.sum()
