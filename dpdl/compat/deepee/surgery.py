"""deepee's conversions of normalisations, by those of `dpdl.validation.conversions`: learned parameters move over.

    model = ModelSurgeon(partial(SurgicalProcedures.BN_to_GN, num_groups=16)).operate(model)

`dpdl.fix` chooses conversions by itself and reports what they change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from dpdl.errors import ParameterError
from dpdl.validation.conversions import (
    batch_norm_to_group_norm,
    batch_norm_to_instance_norm,
    batch_norm_to_layer_norm,
    instance_norm_without_statistics,
)
from dpdl.validation.replacement import replace_modules

__all__ = ["ModelSurgeon", "SurgicalProcedures", "replace_all_modules"]

Converter = Callable[..., nn.Module]  # one module in, one out; more arguments are bound by functools.partial


class SurgicalProcedures:
    """Converters for `ModelSurgeon`."""

    @staticmethod
    def BN_to_IN(module: _BatchNorm) -> nn.Module:
        """Instance normalisation, with the scale and shift of the batch normalisation `module`."""
        return batch_norm_to_instance_norm(module)

    @staticmethod
    def BN_to_BN_nostats(module: _BatchNorm) -> nn.Module:
        """What a batch normalisation module without running statistics is for one example: instance normalisation.

        As nn.BatchNorm it would normalise by the whole batch in eval mode, and differ from training.
        """
        return batch_norm_to_instance_norm(module)

    @staticmethod
    def IN_to_IN_nostats(module: _InstanceNorm) -> nn.Module:
        """The same instance normalisation module without running statistics."""
        return instance_norm_without_statistics(module)

    @staticmethod
    def BN_to_GN(module: _BatchNorm, num_groups: Literal["default"] | int = "default") -> nn.Module:
        """Group normalisation; "default" is the largest number up to 32 that divides the channels.

        Of inputs without positions (BatchNorm1d) groups hold 16 channels at least.

        Args:
            module: batch normalisation.
            num_groups: "default", or how many.

        Raises:
            ParameterError: `num_groups` is neither "default" nor a divisor of the channels.
        """
        if num_groups != "default" and (isinstance(num_groups, bool) or not isinstance(num_groups, int)):
            raise ParameterError(
                f"num_groups must either be set to 'default' or the number of groups, got {num_groups!r}."
            )
        return batch_norm_to_group_norm(module, None if num_groups == "default" else num_groups)

    @staticmethod
    def BN_to_LN(module: _BatchNorm, normalized_shape: int | Sequence[int]) -> nn.Module:
        """Layer normalisation over `normalized_shape`; scale and shift are carried over where they fit it.

        Args:
            module: batch normalisation.
            normalized_shape: as in nn.LayerNorm.
        """
        return batch_norm_to_layer_norm(module, normalized_shape)


class ModelSurgeon:
    """Replaces a model's batch normalisations; with `IN_to_IN_nostats`, its instance normalisations.

    Args:
        converter: one of `SurgicalProcedures`, alone or in a functools.partial, or a function of a module of yours.

    Raises:
        ParameterError: the converter cannot be called.
    """

    def __init__(self, converter: Converter) -> None:
        if not callable(converter):
            raise ParameterError(
                f"converter must be callable, got {converter!r}. Use SurgicalProcedures.BN_to_GN, for instance."
            )
        self.converter = converter

    def operate(self, model: nn.Module) -> nn.Module:
        """The model with its normalisations converted, in place; a new module if the model is one itself."""
        procedure = self.converter
        while isinstance(procedure, partial):
            procedure = procedure.func
        takes_instance_norms = procedure is SurgicalProcedures.IN_to_IN_nostats
        return replace_all_modules(model, _InstanceNorm if takes_instance_norms else _BatchNorm, self.converter)


def replace_all_modules(root: nn.Module, target_class: type[nn.Module], converter: Converter) -> nn.Module:
    """Convert every `target_class` in `root`, in place; all of them or, if one is refused, none.

    Args:
        root: the model.
        target_class: whose instances are converted.
        converter: module to module.
    """
    return replace_modules(root, converter, target_class)
