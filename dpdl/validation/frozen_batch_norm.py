"""Batch normalisation that is frozen for good: a fixed affine map of each channel, whatever the mode."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FrozenBatchNorm"]


class FrozenBatchNorm(nn.Module):
    """What a normalisation with running statistics computes in eval mode, also in training mode.

    y = (x - running_mean) / sqrt(running_var + eps) * weight + bias, channel by channel (axis 1), bit for bit as the
    module that it is made from. Examples never meet and nothing is updated; `weight` and `bias` train if they require
    a gradient. The keys of the state dict are the module's own, so its checkpoints load.

    Args:
        source: a batch normalisation, or an instance normalisation with running statistics. Its parameters and
            buffers move over: the same tensors.

    Guarantee:
        The statistics are part of the released model as they are. They must come from public data.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, source: nn.modules.batchnorm._NormBase) -> None:
        super().__init__()
        self.num_features = source.num_features
        self.eps = source.eps
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(source, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(source, name))
        self.training = source.training

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as `x`, [N, C, ...]."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def extra_repr(self) -> str:
        """As torch's own."""
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"
