"""Errors that are both ours and of the kind that Opacus raises, so that existing `except` clauses still work."""

from __future__ import annotations

from dpdl.errors import LoaderError, ModelError, ParameterError, StepError, WrapError

__all__ = [
    "AccumulationError",
    "BatchKindError",
    "BufferError",
    "EmptyBatchError",
    "ForeignParametersError",
    "NotOfferedError",
]


class AccumulationError(StepError, ValueError):
    """Gradients of several batches met where only those of one may be."""


class BatchKindError(LoaderError, TypeError):
    """A collate function returns something of which an empty batch cannot be made."""


class BufferError(ModelError, NotImplementedError):
    """A module mixes examples or keeps state from them; per-sample gradients of it do not exist."""


class EmptyBatchError(ParameterError, RuntimeError):
    """A comparison was asked for of no examples."""


class ForeignParametersError(WrapError, ValueError):
    """The optimizer holds parameters that the module does not."""


class NotOfferedError(ParameterError, NotImplementedError):
    """A feature of Opacus that is not offered here; the message says what to use instead."""
