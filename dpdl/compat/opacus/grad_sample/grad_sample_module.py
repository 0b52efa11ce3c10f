"""`GradSampleModule` and `GradSampleHooks`: per-sample gradients with or without a module around the model."""

from __future__ import annotations

from typing import Any

from torch import nn

from dpdl.compat.opacus.errors import NotOfferedError
from dpdl.compat.opacus.grad_sample.gsm_base import AbstractGradSampleHooks, AbstractGradSampleModule

__all__ = ["GradSampleHooks", "GradSampleModule", "create_or_accumulate_grad_sample"]


class GradSampleModule(AbstractGradSampleModule):
    """Around a module: after `loss.backward()`, `p.grad_sample` is each example's own gradient, [N, *shape of p].

    Without a private optimizer `p.grad` is what it always is. `p.grad_sample` is computed when it is read.

    Args:
        m: the plain module.
        batch_first: whether its tensors carry examples on their first axis, or on their second.
        loss_reduction: "mean" or "sum", how the loss combines examples.
        strict: taken for compatibility; there is no module that has no rule.
        force_functorch: taken for compatibility; which engine computes makes no difference to the numbers.

    Raises:
        ModelError: the module mixes examples, as batch normalisation does.
    """

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
    ) -> None:
        super().__init__()
        self._set_up(m, batch_first=batch_first, loss_reduction=loss_reduction)


class GradSampleHooks(AbstractGradSampleHooks):
    """The same for a module that stays as it is: its own forward leads to per-sample gradients until `cleanup()`.

    Args: as in `GradSampleModule`.
    """

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
    ) -> None:
        self._set_up(m, batch_first=batch_first, loss_reduction=loss_reduction)
        self._take_over()

    def _take_over(self) -> None:
        """Let calls of the module go through the engine, which in turn calls the module's own forward."""
        forward_now = self._module.forward
        own = getattr(forward_now, "module_s_own", forward_now)  # past what an earlier run has put in place
        inside = False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return own(*args, **kwargs)
            inside = True
            try:
                return self.per_sample(args, kwargs, own)
            finally:
                inside = False

        forward.__dict__["module_s_own"] = own
        self._module.__dict__["forward"] = forward

    def remove_hooks(self) -> None:
        """Give the module its own forward back."""
        super().remove_hooks()
        self._module.__dict__.pop("forward", None)


def create_or_accumulate_grad_sample(*, param: Any, grad_sample: Any, max_batch_len: int) -> None:
    """Refused: there are no samplers that would call it.

    Args:
        param, grad_sample, max_batch_len: Opacus's; not looked at.

    Raises:
        NotOfferedError: always.
    """
    raise NotOfferedError(
        "create_or_accumulate_grad_sample is for grad samplers, which are not needed: every module gets per-sample "
        "gradients from the engines. To set gradients of your own, assign p.grad_sample."
    )
