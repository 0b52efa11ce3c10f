"""`ModuleValidator`: which modules of a model cannot be private, and a model without them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from dpdl.compat.opacus.utils.module_utils import trainable_modules
from dpdl.compat.opacus.validators import known_modules
from dpdl.compat.opacus.validators.errors import IllegalModuleConfigurationError, UnsupportedModuleError
from dpdl.compat.opacus.validators.utils import FIXERS, VALIDATORS

__all__ = ["ModuleValidator"]

_log = logging.getLogger(__name__)


class ModuleValidator:
    """Goes by lists of classes, as Opacus does; `dpdl.check` finds out by running the model, and finds more.

    `make_private` looks again, and at what runs: a module that is not on these lists and mixes examples is refused on
    the first batch.
    """

    VALIDATORS: ClassVar[dict[type[nn.Module], Callable[..., list[Any]]]] = VALIDATORS
    FIXERS: ClassVar[dict[type[nn.Module], Callable[..., nn.Module]]] = FIXERS

    @classmethod
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[UnsupportedModuleError]:
        """What is wrong with a model and its trainable parts, each with its path.

        Args:
            module: the model, which must be in training mode.
            strict: raise if there is anything.

        Raises:
            UnsupportedModuleError: naming all that is wrong, if `strict`.
        """
        errors: list[UnsupportedModuleError] = []
        if not module.training:
            errors.append(IllegalModuleConfigurationError("The model is in eval mode. Call model.train() first."))
        for path, part in _candidates(module):
            found = VALIDATORS.get(type(part), _nothing)(part)
            errors.extend(type(error)(f"{path or 'the model'}: {error}") for error in found)
        if strict and errors:
            raise UnsupportedModuleError("\n".join(str(error) for error in errors))
        return errors

    @classmethod
    def is_valid(cls, module: nn.Module) -> bool:
        """Whether `validate` finds nothing in a module."""
        return not cls.validate(module)

    @classmethod
    def fix(cls, module: nn.Module, **kwargs: Any) -> nn.Module:
        """A copy of a model with its modules replaced where there is a fixer; weights are carried over.

        Args:
            module: the model; it is left as it is. Build the optimizer from the copy.
            kwargs: for the fixers: `num_groups`, `replace_bn_with_in`.
        """
        fixed = copy.deepcopy(module)
        done: dict[int, nn.Module] = {}
        for path, part in list(_candidates(fixed, also_shared=True)):
            if type(part) not in FIXERS:
                continue
            if id(part) not in done:
                done[id(part)] = FIXERS[type(part)](part, **kwargs)
            if done[id(part)] is not part:
                fixed = _replaced(fixed, path, done[id(part)])
                _log.info("Replaced sub_module %s : %s with %s", path, part, done[id(part)])
        return fixed

    @classmethod
    def fix_and_validate(cls, module: nn.Module, **kwargs: Any) -> nn.Module:
        """`fix`, then `validate`; arguments as in `fix`.

        Raises:
            UnsupportedModuleError: something is left that cannot be private.
        """
        fixed = cls.fix(module, **kwargs)
        cls.validate(fixed, strict=True)
        return fixed


def _candidates(module: nn.Module, *, also_shared: bool = False) -> Any:
    """Trainable submodules; and normalisations that keep statistics, trainable or not."""
    trainable = {id(part) for _, part in trainable_modules(module)}
    for path, part in module.named_modules(remove_duplicate=not also_shared):
        keeps = isinstance(part, known_modules.INSTANCE_NORMS) and part.track_running_stats
        if id(part) in trainable or keeps:
            yield path, part


def _replaced(root: nn.Module, path: str, part: nn.Module) -> nn.Module:
    if not path:
        return part
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = part
    return root


def _nothing(module: nn.Module) -> list[UnsupportedModuleError]:
    return []
