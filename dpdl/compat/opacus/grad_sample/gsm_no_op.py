"""Opacus's mode "no_op": the script computes `p.grad_sample` itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from dpdl.compat.opacus.grad_sample.gsm_base import AbstractGradSampleHooks, AbstractGradSampleModule

__all__ = ["GradSampleHooksNoOp", "GradSampleModuleNoOp"]


class GradSampleModuleNoOp(AbstractGradSampleModule):
    """A module around another that computes nothing more; the script sets `p.grad_sample`, [N, *shape of p].

    Args: as in `GradSampleModule`.
    """

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean") -> None:
        super().__init__()
        self._set_up(m, batch_first=batch_first, loss_reduction=loss_reduction)
        self.disable_hooks()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output."""
        return self._module(*args, **kwargs)


class GradSampleHooksNoOp(AbstractGradSampleHooks):
    """The same for a module that stays as it is (`wrap_model=False`).

    Args: as in `GradSampleModule`.
    """

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean") -> None:
        self._set_up(m, batch_first=batch_first, loss_reduction=loss_reduction)
        self.disable_hooks()
