"""Opacus's mode "ew". The engine is the default one: it computes the same gradients, of more modules."""

from __future__ import annotations

from torch import nn

from dpdl.compat.opacus.errors import NotOfferedError
from dpdl.compat.opacus.grad_sample.gsm_base import AbstractGradSampleModule

__all__ = ["GradSampleModuleExpandedWeights"]


class GradSampleModuleExpandedWeights(AbstractGradSampleModule):
    """`GradSampleModule` under the name of mode "ew".

    Args: as in `GradSampleModule`.

    Raises:
        NotOfferedError: `batch_first=False`, which the original refuses too.
    """

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean") -> None:
        if not batch_first:
            raise NotOfferedError('grad_sample_mode="ew" takes batch_first=True only. Use "hooks" or "functorch".')
        super().__init__()
        self._set_up(m, batch_first=batch_first, loss_reduction=loss_reduction)
