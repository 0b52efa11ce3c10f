"""What a validator says of a module."""

from __future__ import annotations

from dpdl.errors import ModelError

__all__ = [
    "IllegalModuleConfigurationError",
    "NotYetSupportedModuleError",
    "ShouldReplaceModuleError",
    "UnsupportableModuleError",
    "UnsupportedError",
    "UnsupportedModuleError",
]


class UnsupportedError(ModelError, ValueError):
    """A part of a run that cannot be private."""


class UnsupportedModuleError(UnsupportedError):
    """A module that cannot be trained privately as it is."""


class UnsupportableModuleError(UnsupportedModuleError):
    """A module that cannot be trained privately at all."""


class NotYetSupportedModuleError(UnsupportedModuleError):
    """A module that is not supported so far."""


class ShouldReplaceModuleError(UnsupportedModuleError):
    """A module that `ModuleValidator.fix` replaces."""


class IllegalModuleConfigurationError(UnsupportedModuleError):
    """A module that is set up in a way that cannot be private."""
