"""What `p.grad_sample` may hold: gradients computed when asked for, or a tensor that the script has put there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dpdl.compat.opacus.errors import AccumulationError
from dpdl.compat.opacus.grad_sample.record import GradSample

__all__ = ["mark_processed", "named", "plain", "refuse_processed"]


def named(tensors: list[Tensor]) -> dict[str, Tensor]:
    """By position; zeros before, so that names sort as positions do."""
    return {f"{index:09d}": tensor for index, tensor in enumerate(tensors)}


def plain(part: Tensor) -> Tensor:
    """The numbers, as an ordinary tensor."""
    return part.plain() if isinstance(part, GradSample) else part


def mark_processed(part: Any) -> None:
    """Remember that a step has used it."""
    if isinstance(part, GradSample):
        part.record.processed = True
    else:
        part._processed_by_step = True


def refuse_processed(part: Any) -> None:
    """Raise if a step has used it.

    Raises:
        AccumulationError: it has.
    """
    done = part.record.processed if isinstance(part, GradSample) else getattr(part, "_processed_by_step", False)
    if done:
        raise AccumulationError(
            "p.grad_sample still holds the gradients of the last step, which would be used twice. Call "
            "optimizer.zero_grad() after each step."
        )
