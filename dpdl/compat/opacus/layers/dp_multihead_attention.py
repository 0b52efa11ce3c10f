"""Multi-head attention under Opacus's names, and its layer that appends a learned row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["DPMultiheadAttention", "SequenceBias"]


class DPMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`: same arguments, outputs and state dict."""


class SequenceBias(nn.Module):
    """Appends one learned row to each sequence.

    Args:
        embed_dim: E, its length.
        batch_first: whether inputs are [N, T, E], or [T, N, E].
    """

    def __init__(self, embed_dim: int, batch_first: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.bias = nn.Parameter(torch.empty(embed_dim))
        nn.init.normal_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T + 1] rows in place of [T]."""
        examples, positions = (0, 1) if self.batch_first else (1, 0)
        row = self.bias.expand(x.shape[examples], -1).unsqueeze(positions)
        return torch.cat([x, row], dim=positions)
