"""Small questions about modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "are_state_dict_equal",
    "clone_module",
    "get_submodule",
    "has_trainable_params",
    "parametrized_modules",
    "requires_grad",
    "trainable_modules",
    "trainable_parameters",
]


def parametrized_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module and its submodules, those that have parameters of their own."""
    yield from ((n, m) for n, m in module.named_modules() if any(True for _ in m.parameters(recurse=False)))


def trainable_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module and its submodules, those that have trainable parameters of their own."""
    yield from ((n, m) for n, m in module.named_modules() if requires_grad(m))


def trainable_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters of a module that require a gradient, with their names."""
    yield from ((n, p) for n, p in module.named_parameters() if p.requires_grad)


def requires_grad(module: nn.Module, *, recurse: bool = False) -> bool:
    """Whether any parameter of `module` (and, with `recurse`, of those below) requires a gradient."""
    return any(p.requires_grad for p in module.parameters(recurse=recurse))


def has_trainable_params(module: nn.Module) -> bool:
    """Whether any parameter of the module and those below requires a gradient."""
    return requires_grad(module, recurse=True)


def clone_module(module: nn.Module) -> nn.Module:
    """A copy of a module that shares nothing with it."""
    return copy.deepcopy(module)


def get_submodule(module: nn.Module, target: str) -> nn.Module:
    """The submodule of `module` at the path `target`; "" is the module itself."""
    return module.get_submodule(target)


def are_state_dict_equal(sd1: Mapping[str, Any], sd2: Mapping[str, Any]) -> bool:
    """Whether the state dicts `sd1` and `sd2` have the same keys and values."""
    return sd1.keys() == sd2.keys() and all(_equal(value, sd2[key]) for key, value in sd1.items())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)
