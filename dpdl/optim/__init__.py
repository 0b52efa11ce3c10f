"""The private optimizer."""

from dpdl.optim.private_optimizer import Diagnostics, PrivateOptimizer

__all__ = ["Diagnostics", "PrivateOptimizer"]
