"""Why the tape cannot record a model."""

from __future__ import annotations

from dpdl.errors import ModelError

__all__ = ["PlanIsStale", "TapeRefusal"]


class TapeRefusal(ModelError):
    """The tape cannot record a call; another engine may."""


class PlanIsStale(Exception):  # not an error: the engine surveys the model again
    """A call was met that no survey has seen in this form."""
