"""Validators and fixers of the modules that Opacus knows. Conversions carry weights over (`dpdl.validation`)."""

from __future__ import annotations

from typing import Any

from torch import nn

from dpdl.compat.opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from dpdl.compat.opacus.validators.errors import (
    IllegalModuleConfigurationError,
    ShouldReplaceModuleError,
    UnsupportableModuleError,
    UnsupportedModuleError,
)
from dpdl.compat.opacus.validators.utils import register_module_fixer, register_module_validator
from dpdl.errors import ParameterError
from dpdl.validation import batch_norm_to_group_norm, batch_norm_to_instance_norm, instance_norm_without_statistics

__all__ = ["BATCH_NORMS", "INSTANCE_NORMS"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Under another name each of these is the same module, with the same weights.
_SAME_UNDER_ANOTHER_NAME: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: DPLSTM,
    nn.GRU: DPGRU,
    nn.MultiheadAttention: DPMultiheadAttention,
}


@register_module_validator(BATCH_NORMS)
def validate_batch_norm(module: nn.Module) -> list[UnsupportedModuleError]:
    """Batch normalisation in training mode mixes examples."""
    return [
        ShouldReplaceModuleError(
            f"{module} normalises each example by the others of its batch, and keeps statistics of the data. "
            "ModuleValidator.fix(model) replaces it by group normalisation, and keeps scale and shift."
        )
    ]


@register_module_fixer(BATCH_NORMS)
def fix_batch_norm(
    module: Any, *, replace_bn_with_in: bool = False, num_groups: int | None = None, **kwargs: Any
) -> nn.Module:
    """Group normalisation, or instance normalisation, with the same scale and shift."""
    if replace_bn_with_in and num_groups is not None:
        raise ParameterError("Give either replace_bn_with_in=True or num_groups: instance normalisation has no groups.")
    if not replace_bn_with_in:
        return batch_norm_to_group_norm(module, num_groups)
    if isinstance(module, nn.SyncBatchNorm):
        raise UnsupportableModuleError(
            "A SyncBatchNorm does not say how many axes its input has, so there is no InstanceNorm for it. Leave "
            "replace_bn_with_in out."
        )
    return batch_norm_to_instance_norm(module)


@register_module_validator(INSTANCE_NORMS)
def validate_instance_norm(module: Any) -> list[UnsupportedModuleError]:
    """Instance normalisation is private unless it keeps statistics."""
    if not module.track_running_stats:
        return []
    return [
        IllegalModuleConfigurationError(
            f"{module} keeps running statistics of the data, which leave with the weights without noise. Set "
            "track_running_stats=False, or let ModuleValidator.fix(model) do it."
        )
    ]


@register_module_fixer(INSTANCE_NORMS)
def fix_instance_norm(module: Any, **kwargs: Any) -> nn.Module:
    """The same without statistics; the module itself if it keeps none."""
    fixed: nn.Module = instance_norm_without_statistics(module) if module.track_running_stats else module
    return fixed


@register_module_validator(list(_SAME_UNDER_ANOTHER_NAME))
def validate_replaced(module: nn.Module) -> list[UnsupportedModuleError]:
    """What Opacus has a layer of its own for. `make_private` takes it as it is."""
    name = _SAME_UNDER_ANOTHER_NAME[type(module)].__name__
    return [
        ShouldReplaceModuleError(
            f"{type(module).__name__} has to be replaced by {name} before Opacus can train it, which "
            "ModuleValidator.fix(model) does. In this library both are trained alike: make_private takes either."
        )
    ]


@register_module_fixer(list(_SAME_UNDER_ANOTHER_NAME))
def fix_replaced(module: nn.Module, **kwargs: Any) -> nn.Module:
    """The same module, with the same parameters, under Opacus's name."""
    target = _SAME_UNDER_ANOTHER_NAME[type(module)]
    fixed = target.__new__(target)
    fixed.__dict__.update(module.__dict__)
    return fixed
