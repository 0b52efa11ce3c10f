"""Private optimizers under Opacus's names."""

from dpdl.compat.opacus.optimizers.adaclipoptimizer import AdaClipDPOptimizer
from dpdl.compat.opacus.optimizers.choice import get_optimizer_class
from dpdl.compat.opacus.optimizers.optimizer import DPOptimizer
from dpdl.compat.opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from dpdl.compat.opacus.optimizers.perlayeroptimizer import DPPerLayerOptimizer

__all__ = [
    "AdaClipDPOptimizer",
    "DPOptimizer",
    "DPOptimizerFastGradientClipping",
    "DPPerLayerOptimizer",
    "get_optimizer_class",
]
