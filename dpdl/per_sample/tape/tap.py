"""A node in the graph that takes the gradient of an operation's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Arrived", "tap"]

# From what was kept of the operation and the gradient of its output.
Arrived = Callable[[tuple[Tensor, ...], Tensor], None]


def tap(output: Tensor, anchor: Tensor, kept: tuple[Tensor, ...], arrived: Arrived) -> Tensor:
    """`output` with a node above it; a backward through it calls `arrived(kept, gradient of output)`.

    `kept` is saved as autograd saves: writing to one of these tensors before the backward is an error, and hooks on
    saved tensors (activation checkpointing, offloading) apply to them.

    Args:
        output: what the operation gave, a tensor of its own (or data that was written to in place). Later operations
            may write to it in place.
        anchor: a scalar that requires a gradient, so that the node is reached also where nothing else asks for it.
        kept: tensors that `arrived` needs.
        arrived: called once for each backward.
    """
    tapped: Tensor = _Tap.apply(output, anchor, arrived, *kept)
    return tapped


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, arrived: Arrived, *kept: Tensor) -> Tensor:
        ctx.mark_dirty(output)  # the tensor itself gets the node: no copy, and not a leaf
        ctx.save_for_backward(*kept)
        ctx.arrived = arrived
        ctx.unused = (None,) * (2 + len(kept))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            ctx.arrived(tuple(kept.detach() for kept in ctx.saved_tensors), gradient)
        return (gradient, *ctx.unused)
