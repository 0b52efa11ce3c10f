"""Which class stands for which `grad_sample_mode`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from dpdl.compat.opacus.errors import NotOfferedError
from dpdl.compat.opacus.grad_sample.grad_sample_module import GradSampleHooks, GradSampleModule
from dpdl.compat.opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from dpdl.compat.opacus.grad_sample.gsm_base import AbstractGradSampleHooks, AbstractGradSampleModule
from dpdl.compat.opacus.grad_sample.gsm_exp_weights import GradSampleModuleExpandedWeights
from dpdl.compat.opacus.grad_sample.gsm_no_op import GradSampleHooksNoOp, GradSampleModuleNoOp

__all__ = [
    "get_gsm_class",
    "get_hooks_class",
    "prepare_module",
    "register_grad_sampler",
    "register_norm_sampler",
    "wrap_model",
]

_MODULES: dict[str, type[AbstractGradSampleModule]] = {
    "hooks": GradSampleModule,
    "functorch": GradSampleModule,
    "ew": GradSampleModuleExpandedWeights,
    "ghost": GradSampleModuleFastGradientClipping,
    "no_op": GradSampleModuleNoOp,
}
_HOOKS: dict[str, type[AbstractGradSampleHooks]] = {
    "hooks": GradSampleHooks,
    "functorch": GradSampleHooks,
    "ghost": GradSampleHooksFastGradientClipping,
    "no_op": GradSampleHooksNoOp,
}
_FUNCTION = Callable[..., Any]
Kind = TypeVar("Kind")


def get_gsm_class(grad_sample_mode: str) -> type[AbstractGradSampleModule]:
    """The class that wraps a module in this mode.

    Args:
        grad_sample_mode: as in `prepare_module`.

    Raises:
        NotOfferedError: there is none.
    """
    return _chosen(grad_sample_mode, _MODULES)


def get_hooks_class(grad_sample_mode: str) -> type[AbstractGradSampleHooks]:
    """The class that leaves a module as it is (`wrap_model=False`) in this mode.

    Raises:
        NotOfferedError: there is none.
    """
    return _chosen(grad_sample_mode, _HOOKS)


def _chosen(mode: str, classes: dict[str, type[Kind]]) -> type[Kind]:
    if mode in classes:
        return classes[mode]
    if mode in ("ghost_fsdp", "ghost_tp"):
        raise NotOfferedError(
            f"grad_sample_mode={mode!r} is not offered by this facade, which runs on one device. Use "
            'grad_sample_mode="ghost" on one device, or dpdl.make_private, the library\'s own interface.'
        )
    raise NotOfferedError(f"grad_sample_mode must be one of {sorted(classes)}, got {mode!r}.")


def prepare_module(
    model: nn.Module, grad_sample_mode: str, wrap_model: bool = True, **kwargs: Any
) -> AbstractGradSampleHooks:
    """A module with per-sample gradients in a mode, wrapped or as it is.

    Args:
        model: the plain module.
        grad_sample_mode: "hooks", "functorch", "ew", "ghost" or "no_op".
        wrap_model: put a module around it, or take over its forward until `cleanup()`.
        kwargs: for the class.

    Raises:
        NotOfferedError: there is no such mode here.
    """
    chosen: type[Any] = get_gsm_class(grad_sample_mode) if wrap_model else get_hooks_class(grad_sample_mode)
    made: AbstractGradSampleHooks = chosen(model, **kwargs)
    return made


def wrap_model(model: nn.Module, grad_sample_mode: str, **kwargs: Any) -> AbstractGradSampleHooks:
    """The older name of `prepare_module`; arguments and errors as in `prepare_module`."""
    return prepare_module(model, grad_sample_mode, **kwargs)


def register_grad_sampler(target_class_or_classes: Any) -> Callable[[_FUNCTION], _FUNCTION]:
    """Taken for compatibility: the engines compute per-sample gradients of every module, and call no samplers.

    Args:
        target_class_or_classes: not looked at.
    """
    return lambda function: function


def register_norm_sampler(target_class_or_classes: Any) -> Callable[[_FUNCTION], _FUNCTION]:
    """Taken for compatibility, as `register_grad_sampler`."""
    return lambda function: function
