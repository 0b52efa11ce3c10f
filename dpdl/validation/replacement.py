"""Exchanges modules inside of a model: all or none, wherever they are registered, and never what would be lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from dpdl.errors import ModelError, ParameterError
from dpdl.per_sample.compiled import refuse_compiled
from dpdl.validation.conversions import refuse_parametrizations
from dpdl.validation.whole_norm import convert_whole

__all__ = [
    "BATCH_NORMS",
    "Replacement",
    "apply_replacements",
    "hooks_of",
    "modules_and_paths",
    "plan_replacements",
    "refuse_models_that_cannot_change",
    "refuse_unfinished",
    "replace_modules",
    "where",
]

BATCH_NORMS: tuple[type[nn.Module], ...] = (_BatchNorm,)

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One module to be exchanged.

    Attributes:
        paths: where it is registered in the model; "" is the model itself.
        module: what is there.
        replacement: what comes there, one for all paths.
    """

    paths: tuple[str, ...]
    module: nn.Module
    replacement: nn.Module


def replace_modules(
    model: nn.Module,
    converter: Callable[[nn.Module], nn.Module],
    kinds: type[nn.Module] | tuple[type[nn.Module], ...] = BATCH_NORMS,
) -> nn.Module:
    """Exchange every module of some kinds, in place.

    A module that is registered in several places is converted once, and stays one. Nothing is exchanged if any
    conversion is refused.

    Args:
        model: changed in place.
        converter: from a module to its replacement, or to itself to leave it; one of `dpdl.validation.conversions`,
            bound to its options with functools.partial, or one's own. For a class made from one of torch's
            normalisations that does more, it is asked for the normalisation only.
        kinds: modules of these classes, and of classes made from them.

    Returns:
        The model; its replacement, if it is itself of one of these kinds.

    Raises:
        ModelError: a module has hooks, parametrizations or no shape yet, or its class does what would be lost.
        ParameterError: from the converter.

    Example:
        >>> from dpdl.validation.conversions import batch_norm_to_group_norm
        >>> replace_modules(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)), batch_norm_to_group_norm)[1].num_groups
        1
    """
    return apply_replacements(model, plan_replacements(model, lambda _, module: converter(module), kinds))


def plan_replacements(
    model: nn.Module,
    converter: Callable[[tuple[str, ...], nn.Module], nn.Module],
    kinds: type[nn.Module] | tuple[type[nn.Module], ...],
) -> list[Replacement]:
    """What would be exchanged; the model is left as it is.

    Args:
        model: the model.
        converter: from a module and its paths to its replacement, or to itself to leave it.
        kinds: modules to ask it about. Modules inside of one that is replaced are not.

    Raises:
        ModelError, ParameterError: naming all modules whose conversion was refused.
    """
    refuse_models_that_cannot_change(model)
    replacements: list[Replacement] = []
    refusals: list[ModelError | ParameterError] = []
    done: list[str] = []
    for paths, module in modules_and_paths(model):
        if not isinstance(module, kinds) or any(paths[0].startswith(outer) for outer in done):
            continue
        try:
            replacement = _converted(module, paths, converter)
        except (ModelError, ParameterError) as error:
            refusals.append(error)
            continue
        if replacement is not module:
            replacements.append(Replacement(paths=paths, module=module, replacement=replacement))
            done += [f"{path}." if path else "" for path in paths]
    if refusals:
        kind = ParameterError if all(isinstance(error, ParameterError) for error in refusals) else ModelError
        raise kind("Nothing was replaced:\n" + "\n".join(f"  - {error}" for error in refusals))
    return replacements


def apply_replacements(model: nn.Module, replacements: list[Replacement]) -> nn.Module:
    """Carry out what was planned for this model; the model, or what stands in its place."""
    for each in replacements:
        for path in each.paths:
            if not path:
                return each.replacement  # the only one: it holds all others
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent)._modules[name] = each.replacement
    return model


def where(paths: tuple[str, ...]) -> str:
    """The module, in the words of an error."""
    return " = ".join(f"module '{path}'" if path else "the model itself" for path in paths)


def hooks_of(module: nn.Module) -> list[str]:
    """The kinds of hooks that are registered on a module itself."""
    return [name.strip("_") for name in HOOKS if getattr(module, name)]


def modules_and_paths(model: nn.Module) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Each module once, outer ones first, with all of its paths."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    return ((tuple(found), module) for module, found in paths.items())


def _converted(
    module: nn.Module, paths: tuple[str, ...], converter: Callable[[tuple[str, ...], nn.Module], nn.Module]
) -> nn.Module:
    try:
        replacement = (
            convert_whole(module, lambda norm: converter(paths, norm))
            if isinstance(module, _NormBase)
            else converter(paths, module)
        )
        if replacement is not module:
            _refuse_losses(module)
    except ParameterError as error:
        raise ParameterError(f"{where(paths)}: {error}") from error
    except ModelError as error:
        raise ModelError(f"{where(paths)}: {error}") from error
    return replacement


def _refuse_losses(module: nn.Module) -> None:
    refuse_parametrizations(module)
    if hooks := hooks_of(module):
        raise ModelError(
            f"{type(module).__name__} has {', '.join(hooks)}, which a replacement would lose. Remove "
            "them first (the handles of register_..._hook have remove()), and register them again after."
        )


def refuse_unfinished(model: nn.Module) -> None:
    """Raise a ModelError if the model is compiled, or has parts without a shape: neither can be looked into."""
    refuse_compiled(model)
    for path, module in model.named_modules():
        if _has_no_shape(module):
            raise ModelError(
                f"{where((path,))} ({type(module).__name__}) has no shape yet. Run the model once on a batch that "
                "is not private."
            )


def refuse_models_that_cannot_change(model: nn.Module) -> None:
    """Raise a ModelError if parts of the model cannot be exchanged at all."""
    refuse_unfinished(model)
    for path, module in model.named_modules():
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)):
            raise ModelError(
                f"{where((path,))} is a {type(module).__name__}, whose parts cannot be exchanged. Fix the plain module "
                "that it was made from, then make it anew."
            )


def _has_no_shape(module: nn.Module) -> bool:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and is_lazy(tensor) for tensor in tensors)
