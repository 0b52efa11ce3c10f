"""Per-sample gradients of one linear layer from what went in and what came back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["compute_linear_grad_sample"]


def compute_linear_grad_sample(
    layer: nn.Linear, activations: Sequence[Tensor], backprops: Tensor
) -> dict[Tensor, Tensor]:
    """The gradient of each example, [N, *shape], by parameter.

    Args:
        layer: the layer.
        activations: its input [N, ..., i], in a list.
        backprops: the gradient of its output, [N, ..., o].
    """
    found: dict[Tensor, Tensor] = {}
    if layer.weight.requires_grad:
        found[layer.weight] = torch.einsum("n...o,n...i->noi", backprops, activations[0])
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = torch.einsum("n...o->no", backprops)
    return found
