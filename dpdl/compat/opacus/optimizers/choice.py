"""Which optimizer stands for which way to clip."""

from __future__ import annotations

from dpdl.compat.opacus.errors import NotOfferedError
from dpdl.compat.opacus.optimizers.adaclipoptimizer import AdaClipDPOptimizer
from dpdl.compat.opacus.optimizers.optimizer import DPOptimizer
from dpdl.compat.opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from dpdl.compat.opacus.optimizers.perlayeroptimizer import DPPerLayerOptimizer

__all__ = ["get_optimizer_class"]


def get_optimizer_class(clipping: str, distributed: bool, grad_sample_mode: str | None = None) -> type[DPOptimizer]:
    """The optimizer for a way to clip.

    Args:
        clipping: "flat", "per_layer" or "adaptive".
        distributed: whether there are several processes; not offered here.
        grad_sample_mode: as in `PrivacyEngine.make_private`.

    Raises:
        NotOfferedError: several processes, or an unknown way to clip.
    """
    if distributed:
        raise NotOfferedError(
            "This facade runs in one process. For several, use dpdl.make_private, the library's own interface."
        )
    classes = {"flat": DPOptimizer, "per_layer": DPPerLayerOptimizer, "adaptive": AdaClipDPOptimizer}
    if clipping not in classes:
        raise NotOfferedError(f"clipping must be one of {sorted(classes)}, got {clipping!r}.")
    if clipping == "flat" and grad_sample_mode == "ghost":
        return DPOptimizerFastGradientClipping
    return classes[clipping]
