"""Per-sample gradients the slow way: a Python loop, batches of one, plain autograd, float64.

The definition that every engine is held to: the gradient of example n is the gradient of
`loss_fn(model(x[n:n+1]), y[n:n+1])`. Shares no code with the library.

References:
    [1] Abadi et al., Deep Learning with Differential Privacy, 2016, Algorithm 1. arXiv:1607.00133
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
LossFunction = Callable[[Any, Tensor], Tensor]


def map_inputs(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """The same structure with `function` applied to each tensor."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, tuple):
        return tuple(function(value) for value in inputs)
    return {key: function(value) for key, value in inputs.items()}


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """To `dtype`, but only if it is a float: tokens and classes stay integers."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def call(model: nn.Module, inputs: Inputs) -> Any:
    """A tuple is passed by position, a mapping by keyword."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs)


def in_float64(model: nn.Module, inputs: Inputs, targets: Tensor) -> tuple[nn.Module, Inputs, Tensor]:
    """A float64 copy of the model (ties and modes kept) and of its data."""
    twin = copy.deepcopy(model).double()
    return twin, map_inputs(inputs, lambda t: cast(t, torch.float64)), cast(targets, torch.float64)


def per_sample_gradients(model: nn.Module, loss_fn: LossFunction, inputs: Inputs, targets: Tensor) -> dict[str, Tensor]:
    """Each trainable parameter's gradients, [N, *shape], float64; zero where a parameter is not used."""
    model, inputs, targets = in_float64(model, inputs, targets)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in trainable}
    for n in range(len(targets)):
        outputs = call(model, map_inputs(inputs, lambda t, n=n: t[n : n + 1].clone()))
        loss = loss_fn(outputs, targets[n : n + 1])
        gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        for (name, parameter), gradient in zip(trainable.items(), gradients, strict=True):
            rows[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return {
        name: torch.stack(rows[name]) if rows[name] else p.new_zeros((0, *p.shape)).detach()
        for name, p in trainable.items()
    }


def norms_of(gradients: Mapping[str, Tensor]) -> Tensor:
    """L2 norm of each example's whole gradient, [N]."""
    return torch.stack([g.reshape(len(g), -1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()


def clipped_sum_of(gradients: Mapping[str, Tensor], max_grad_norm: float) -> dict[str, Tensor]:
    """sum_n min(1, C / ||g_n||) g_n, one example after the other [1]."""
    total = {name: torch.zeros_like(g[0]) for name, g in gradients.items()}
    for n, norm in enumerate(norms_of(gradients).tolist()):
        weight = 1.0 if norm <= max_grad_norm else max_grad_norm / norm
        for name, gradient in gradients.items():
            total[name] += weight * gradient[n]
    return total


def worst_error(measured: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> tuple[float, str]:
    """Largest relative L2 error of any parameter, and that parameter's name.

    Relative to the norm of the parameter's own true value, but at least to a thousandth of the norm
    over all parameters: some true gradients are zero (a key bias in attention, a bias before a norm).
    """
    assert set(measured) == set(true), set(measured) ^ set(true)
    floor = 1e-3 * float(torch.stack([t.square().sum() for t in true.values()]).sum().sqrt())
    errors = {}
    for name, value in true.items():
        assert measured[name].shape == value.shape, (name, measured[name].shape, value.shape)
        scale = max(float(value.norm()), floor)
        error = float((measured[name].double() - value).norm())
        errors[name] = error / scale if scale > 0 else error
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst
