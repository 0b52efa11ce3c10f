"""Autocast and the recurrent layers: the work is done in the dtype of the weights, whatever autocast says.

Under autocast torch's own CPU layers round inputs, weights and states to bfloat16 and give bfloat16 outputs (LSTM
and RNN), or round only the operands of their matrix products (GRU, whose states and outputs stay as they were). A
sum over the positions is no place to lose digits, and the per-sample gradients are wanted in float32 anyway, so
here nothing is rounded on the way: only the outputs get the dtype that torch's would have, for what comes after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["backward_pass", "output_dtype"]

Backward = TypeVar("Backward", bound=Callable[..., tuple[Tensor | None, ...]])


def output_dtype(kind: str, inputs: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that torch's layer would give its outputs here and now."""
    device = inputs.device.type
    if torch.is_autocast_enabled(device) and (device != "cpu" or kind != "gru"):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def backward_pass(backward: Backward) -> Backward:
    """A backward pass that computes as the forward pass did, also under autocast, and refuses to be differentiated."""

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # Not from ctx.saved_tensors: activation checkpointing allows them to be read only once.
        with torch.autocast(ctx.weights.input.device.type, enabled=False):
            return backward(ctx, *gradients)

    return cast(Backward, once_differentiable(run))
