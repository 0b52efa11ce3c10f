"""Activation checkpointing, seen from the tape: parts of a forward that run again during the backward.

Non-reentrant checkpointing drops what autograd saves, and runs the part again to save the same tensors in the same
order: the recorder has to act again as it did. Reentrant checkpointing runs the part with gradients off first, and
again with a graph during the backward, with a backward of its own: `torch.autograd.grad` is refused there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

__all__ = ["keeping_saved_tensors", "leaf_gradients", "saved_tensors_are_hooked"]


def saved_tensors_are_hooked() -> bool:
    """Whether what autograd saves now passes through hooks."""
    if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    # torch 2.6 does not tell; but what it saves has its hooks then, and takes no others.
    with torch.enable_grad():
        node: Any = torch.ones((), requires_grad=True).square().grad_fn
    try:
        node._raw_saved_self.register_hooks(_same, _same)
    except RuntimeError:
        return True
    return False


def keeping_saved_tensors() -> AbstractContextManager[None]:
    """Inside, what autograd saves is kept as it is, whatever hooks there are outside."""
    hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(_same, _same)
    return hooks


def _same(tensor: Tensor) -> Tensor:
    return tensor


def leaf_gradients(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    leaves: Sequence[Tensor],
    *,
    reentrant: bool,
    keep: bool = False,
) -> list[Tensor | None]:
    """Gradients of leaves, left in their `.grad` as well.

    Args:
        reentrant: whether parts may run backward passes of their own, which find leaves that are not given.
        keep: whether the way will be gone again.
    """
    torch.autograd.backward(outputs, cotangents, inputs=None if reentrant else leaves, retain_graph=keep)
    return [leaf.grad for leaf in leaves]
