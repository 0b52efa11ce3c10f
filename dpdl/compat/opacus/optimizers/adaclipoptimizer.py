"""Adaptive clipping, which is not offered yet."""

from __future__ import annotations

from typing import Any

from dpdl.compat.opacus.errors import NotOfferedError
from dpdl.compat.opacus.optimizers.optimizer import DPOptimizer

__all__ = ["AdaClipDPOptimizer"]


class AdaClipDPOptimizer(DPOptimizer):
    """The name; making one is refused.

    Raises:
        NotOfferedError: always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotOfferedError(
            'clipping="adaptive" is not offered by this facade. Use clipping="flat" with a max_grad_norm found on '
            "public data, or a grad-clip scheduler (dpdl.compat.opacus.schedulers)."
        )
