"""Adaptive clipping, which is not offered yet."""

from __future__ import annotations

from typing import Any

from dpdl.compat.opacus.errors import NotOfferedError
from dpdl.compat.opacus.optimizers.optimizer import DPOptimizer

__all__ = ["AdaClipDPOptimizer"]


class AdaClipDPOptimizer(DPOptimizer):
    """The name of the optimizer with adaptive clipping [1]; making one is refused, so it has no guarantee.

    Raises:
        NotOfferedError: always.

    References:
        [1] Andrew, Thakkar, McMahan, Ramaswamy, Differentially Private Learning with Adaptive Clipping, 2021.
            arXiv:1905.03871
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotOfferedError(
            'clipping="adaptive" is not offered by this facade. Use clipping="flat" with a max_grad_norm found on '
            "public data, or a grad-clip scheduler (dpdl.compat.opacus.schedulers)."
        )
