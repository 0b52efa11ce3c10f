"""The tape engine: per-sample gradients recorded operation by operation over one plain forward pass."""

from dpdl.per_sample.tape.engine import TapeEngine

__all__ = ["TapeEngine"]
