"""Whether a model can be trained privately, found out by running it."""

from dpdl.validation.check import Check, check

__all__ = ["Check", "check"]
