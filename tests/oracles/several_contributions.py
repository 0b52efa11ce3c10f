"""The gradient of an example whose loss is spread over several terms: one example at a time, one term at a time.

Each term is a function of the model and of one example's data. An example's gradient is the sum of its terms'
gradients; it is clipped as a whole. Shares no code with the library.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.oracles.one_at_a_time import clipped_sum_of

Term = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]


def summed_gradients(model: nn.Module, terms: Sequence[Term], data: Sequence[Tensor]) -> dict[str, Tensor]:
    """Each parameter's gradients, [N, *shape].

    Args:
        terms: each from (model, one example's rows [1, ...]) to that example's share of the loss.
        data: tensors [N, ...].
    """
    twin = copy.deepcopy(model)
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in twin.named_parameters()}
    for n in range(len(data[0])):
        example = tuple(tensor[n : n + 1].clone() for tensor in data)
        total = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
        for term in terms:
            found = torch.autograd.grad(term(twin, example), list(twin.parameters()), allow_unused=True)
            for name, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    total[name] = total[name] + gradient
        for name, gradient in total.items():
            rows[name].append(gradient)
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


def clipped_sum(
    model: nn.Module, terms: Sequence[Term], data: Sequence[Tensor], max_grad_norm: float
) -> dict[str, Tensor]:
    """sum_n min(1, C / ||g_n||) g_n for the examples' whole gradients."""
    return clipped_sum_of(summed_gradients(model, terms, data), max_grad_norm)
