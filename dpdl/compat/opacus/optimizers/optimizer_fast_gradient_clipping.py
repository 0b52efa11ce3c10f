"""The optimizer of ghost mode, which differs from `DPOptimizer` in name only: all modes clip by norms."""

from __future__ import annotations

from dpdl.compat.opacus.optimizers.optimizer import DPOptimizer

__all__ = ["DPOptimizerFastGradientClipping"]


class DPOptimizerFastGradientClipping(DPOptimizer):
    """`DPOptimizer` under the name that ghost mode gives it."""
