"""Normalisation within an example, and BatchNorm once it has stopped looking at the batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.per_sample.case import N, SmallModel, normal, tokens

X = normal(N, 4, 5, 3, seed=21)
Y = tokens(N, vocabulary=3, seed=22)


class Normalised(nn.Module):
    """Convolution, norm over [N, 4, 5, 3], tanh, linear."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = norm
        self.head = nn.Linear(60, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.convolution(x)).tanh().flatten(1))


def with_statistics(norm: nn.Module) -> nn.Module:
    """A BatchNorm that has seen data."""
    norm.running_mean.copy_(normal(4, seed=23))
    norm.running_var.copy_(normal(4, seed=24).square() + 0.5)
    return norm


def frozen_batch_norm() -> nn.Module:
    return Normalised(with_statistics(nn.BatchNorm2d(4)).requires_grad_(False))


def own_rms_norm() -> nn.Module:
    class OwnRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.gain

    return Normalised(OwnRMSNorm())


model = partial(SmallModel, inputs=X, targets=Y, loss_fn=F.cross_entropy)


MODELS = (
    model(name="layer_norm", build=lambda: Normalised(nn.LayerNorm((5, 3)))),
    model(name="layer_norm_without_bias", build=lambda: Normalised(nn.LayerNorm(3, bias=False))),
    model(name="group_norm", build=lambda: Normalised(nn.GroupNorm(2, 4))),
    model(name="group_norm_without_affine", build=lambda: Normalised(nn.GroupNorm(2, 4, affine=False))),
    model(name="instance_norm", build=lambda: Normalised(nn.InstanceNorm2d(4, affine=True))),
    model(name="rms_norm", build=lambda: Normalised(nn.RMSNorm(3))),
    model(name="rms_norm_written_out", build=own_rms_norm),
    model(name="batch_norm_frozen_in_eval_mode", build=frozen_batch_norm, eval_mode=True),
    model(
        name="batch_norm_trainable_affine_in_eval_mode",
        build=lambda: Normalised(with_statistics(nn.BatchNorm2d(4))),
        eval_mode=True,
    ),
)
