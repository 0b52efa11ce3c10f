"""Ghost mode: per-sample norms without per-sample gradients.

The engines of every mode do that; what these classes add is the names of Opacus's ghost mode, and that nothing is kept
after the step.
"""

from __future__ import annotations

from torch import Tensor, nn

from dpdl.compat.opacus.grad_sample.grad_sample_module import GradSampleHooks
from dpdl.compat.opacus.grad_sample.gsm_base import AbstractGradSampleHooks, AbstractGradSampleModule

__all__ = ["GradSampleHooksFastGradientClipping", "GradSampleModuleFastGradientClipping"]


class _Norms(AbstractGradSampleHooks):
    """Norms and clipping weights of the last batch. Private: computed without noise."""

    max_grad_norm: float
    use_ghost_clipping: bool

    def get_norm_sample(self) -> Tensor:
        """L2 norm of each example's gradient over all parameters, [N]."""
        return self._last_norms()

    def get_clipping_coef(self) -> Tensor:
        """min(1, max_grad_norm / norm) for each example, [N]."""
        return (self.max_grad_norm / (self.get_norm_sample() + 1e-6)).clamp(max=1.0)

    @property
    def per_sample_gradient_norms(self) -> Tensor:
        """The same as `get_norm_sample()`, shape [N]."""
        return self.get_norm_sample()


class GradSampleModuleFastGradientClipping(AbstractGradSampleModule, _Norms):
    """`GradSampleModule` for ghost clipping.

    Args:
        m, batch_first, loss_reduction, strict, force_functorch: as in `GradSampleModule`.
        max_grad_norm: for `get_clipping_coef`; the optimizer has its own.
        use_ghost_clipping: taken for compatibility; the engine chooses for each parameter.
    """

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
        max_grad_norm: float = 1,
        use_ghost_clipping: bool = True,
    ) -> None:
        super().__init__()
        self.max_grad_norm = max_grad_norm
        self.use_ghost_clipping = use_ghost_clipping
        self._set_up(m, batch_first=batch_first, loss_reduction=loss_reduction, keep=False, norms=True)


class GradSampleHooksFastGradientClipping(GradSampleHooks, _Norms):
    """`GradSampleHooks` for ghost clipping.

    Args: as in `GradSampleModuleFastGradientClipping`.
    """

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
        max_grad_norm: float = 1,
        use_ghost_clipping: bool = True,
    ) -> None:
        self.max_grad_norm = max_grad_norm
        self.use_ghost_clipping = use_ghost_clipping
        self._set_up(m, batch_first=batch_first, loss_reduction=loss_reduction, keep=False, norms=True)
        self._take_over()
