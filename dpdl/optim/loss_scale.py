"""What a `torch.amp.GradScaler` has multiplied the loss by, so that it can be taken out before clipping.

    scaler.scale(loss).backward(); scaler.unscale_(optimizer) (optional); scaler.step(optimizer); scaler.update()

The scaler tells its scale to an optimizer that says `_step_supports_amp_scaling`, as `optimizer.grad_scale`; but not if
`unscale_` was called before, which divides `p.grad` and leaves no trace. Nor does it work at all without a `p.grad` to
look at for overflow. A private run keeps its gradients elsewhere. So a backward leaves one zero gradient, that of the
smallest parameter, which notices what it is multiplied by.

The scaler never finds an overflow in a zero, and that is wanted: whether private gradients overflow is private. A scale
that followed them would carry that from step to step without noise, and a skipped step would tell it. An example whose
gradient overflows gets weight 0, as any that is not finite. The price is that the scale only grows, which a scaler does
every `growth_interval` steps; the growth is warned of.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dpdl.errors import PrivacyWarning, StepError

__all__ = ["LossScale"]


class LossScale:
    """Finds out the loss scale of the open batch."""

    def __init__(self) -> None:
        self._marked: Tensor | None = None
        self._last: float | None = None

    @property
    def is_marked(self) -> bool:
        """Whether the zero gradient is in place."""
        return self._marked is not None and isinstance(self._marked.grad, _ZeroGradient)

    def mark(self, trainable: Mapping[str, Tensor], released: Mapping[str, Tensor]) -> None:
        """Leave the zero gradient, if there is a parameter to leave it with.

        Args:
            trainable: the parameters by name.
            released: gradients that the last step has left; one may be replaced.
        """
        if not trainable:
            return  # all were frozen since the forward
        name, smallest = min(trainable.items(), key=lambda item: item[1].numel())
        if smallest.grad is None or smallest.grad is released.get(name) or not bool(smallest.grad.any()):
            smallest.grad = _ZeroGradient.like(smallest)
            self._marked = smallest

    def unmark(self) -> None:
        """Take the zero gradient away, if it is still there; a step would apply weight decay to its parameter."""
        if self._marked is not None and isinstance(self._marked.grad, _ZeroGradient):
            self._marked.grad = None
        self._marked = None

    def taken(self, grad_scale: Tensor | float | None) -> float:
        """The scale, which is hereby used up; 1.0 if there is none.

        Args:
            grad_scale: what the scaler has set on the optimizer; None if it set nothing, or unscaled before.

        Raises:
            StepError: the scale is not a positive number.
        """
        scale = 1.0 if grad_scale is None else float(grad_scale)
        seen = [] if self._marked is None else getattr(self._marked.grad, "factors", [])
        for inverse in seen:
            scale /= float(inverse)
        if not 0 < scale < math.inf:
            raise StepError(
                f"The gradient scaler's scale is {scale}. Use torch.amp.GradScaler with an init_scale such as 65536 "
                "and a growth_interval longer than the run."
            )
        if self._last is not None and scale > self._last > 1.0:
            warnings.warn(
                f"The gradient scaler's scale has grown from {self._last:g} to {scale:g}. It will not shrink: whether "
                "gradients of private examples overflow is private, so the scaler is not told, and examples whose "
                "gradient overflows are left out. Set GradScaler(growth_interval=...) longer than the run.",
                PrivacyWarning,
                stacklevel=4,
            )
        seen.clear()
        self._last = scale
        return scale


class _ZeroGradient(Tensor):
    """Zeros that remember what a gradient scaler multiplied them by."""

    factors: list[Tensor]

    @classmethod
    def like(cls, parameter: Tensor) -> _ZeroGradient:
        zeros = torch.zeros_like(parameter).detach().as_subclass(cls)
        zeros.factors = []
        return zeros

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As for any tensor, with plain tensors as results."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func is torch._amp_foreach_non_finite_check_and_unscale_:
            gradients, _, inverse_scale = args
            for gradient in gradients:
                if isinstance(gradient, _ZeroGradient):
                    gradient.factors.append(inverse_scale.clone())
        return result
