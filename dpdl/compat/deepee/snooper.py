"""deepee's static check of a model. The wrappers besides look dynamically, as `dpdl.check` does: by running it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from dpdl.errors import ModelError

__all__ = ["BN_running_stats_off", "BadModuleError", "IN_running_stats_off", "ModelSnooper", "Validator"]


class BadModuleError(ModelError):
    """A module keeps statistics of what it sees, or mixes examples."""


class Validator:
    """A test of a model, and what to say if it fails.

    Args:
        name: for readers.
        val_func: model to whether it passes.
        message: what `validate` returns if it does not.
    """

    def __init__(self, name: str, val_func: Callable[[nn.Module], bool], message: str) -> None:
        self.name = name
        self.val_func = val_func
        self.message = message

    def validate(self, model: nn.Module) -> str:
        """The message if the model fails, else an empty string."""
        return "" if self.val_func(model) else self.message


class ModelSnooper:
    """Looks for normalisations that keep running statistics of private data.

    Attributes:
        validators: what is looked for; may be added to.
    """

    def __init__(self) -> None:
        self.validators = [
            Validator(
                "InstanceNorm Running Stats Off",
                IN_running_stats_off,
                "InstanceNorm layers must have track_running_stats turned off: "
                "ModelSurgeon(SurgicalProcedures.IN_to_IN_nostats).operate(model). ",
            ),
            Validator(
                "BatchNorm Running Stats Off",
                BN_running_stats_off,
                "BatchNorm layers must have track_running_stats turned off, or be replaced with GroupNorm, "
                "InstanceNorm or LayerNorm: ModelSurgeon(SurgicalProcedures.BN_to_GN).operate(model). ",
            ),
        ]

    def snoop(self, model: nn.Module) -> None:
        """Run all validators on a model.

        Raises:
            BadModuleError: with the messages of those that failed, and the modules that keep statistics.
        """
        messages = "".join(validator.validate(model) for validator in self.validators)
        if messages:
            named = [f"'{name}' ({type(m).__name__})" for name, m in model.named_modules() if _tracks(m, _NormBase)]
            raise BadModuleError(messages + (f"Found: {', '.join(named)}." if named else ""))


def IN_running_stats_off(model: nn.Module) -> bool:
    """Whether no instance normalisation of the model keeps running statistics."""
    return not any(_tracks(module, _InstanceNorm) for module in model.modules())


def BN_running_stats_off(model: nn.Module) -> bool:
    """Whether no batch normalisation of the model, SyncBatchNorm included, keeps running statistics."""
    return not any(_tracks(module, _BatchNorm) for module in model.modules())


def _tracks(module: nn.Module, kind: type[nn.Module]) -> bool:
    return isinstance(module, kind) and bool(module.track_running_stats)
