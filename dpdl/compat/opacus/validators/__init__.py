"""Which modules cannot be private, and what replaces them."""

from dpdl.compat.opacus.validators.module_validator import ModuleValidator
from dpdl.compat.opacus.validators.utils import register_module_fixer, register_module_validator

__all__ = ["ModuleValidator", "register_module_fixer", "register_module_validator"]
