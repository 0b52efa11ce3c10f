"""How validators and fixers of one's own are added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

__all__ = ["FIXERS", "VALIDATORS", "register_module_fixer", "register_module_validator"]

Function = TypeVar("Function", bound=Callable[..., Any])
Classes = type[nn.Module] | Sequence[type[nn.Module]]

VALIDATORS: dict[type[nn.Module], Callable[..., list[Any]]] = {}
FIXERS: dict[type[nn.Module], Callable[..., nn.Module]] = {}


def register_module_validator(target_class_or_classes: Classes) -> Callable[[Function], Function]:
    """Let a function, module to list of errors, validate modules of these classes.

    Args:
        target_class_or_classes: whose instances it looks at.
    """
    return _registering(VALIDATORS, target_class_or_classes)


def register_module_fixer(target_class_or_classes: Classes) -> Callable[[Function], Function]:
    """Let a function, module and options to module, replace modules of these classes.

    Args:
        target_class_or_classes: whose instances it replaces.
    """
    return _registering(FIXERS, target_class_or_classes)


def _registering(registry: dict[type[nn.Module], Any], classes: Classes) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        for each in [classes] if isinstance(classes, type) else classes:
            registry[each] = function
        return function

    return register
