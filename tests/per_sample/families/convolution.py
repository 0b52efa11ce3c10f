"""Convolutions: every rank, padding mode, stride, dilation, group and transpose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.per_sample.case import N, SmallModel, normal, tokens

X1 = normal(N, 4, 9, seed=11)
X2 = normal(N, 4, 7, 6, seed=12)
X3 = normal(N, 2, 5, 4, 5, seed=13)
Y = tokens(N, vocabulary=3, seed=14)


class Pooled(nn.Module):
    """A convolution, tanh, weighted mean over space (so that no two positions count the same), linear."""

    def __init__(self, convolution: nn.Module, channels: int) -> None:
        super().__init__()
        self.convolution = convolution
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.convolution(x).tanh().flatten(2)
        weights = torch.linspace(-1.0, 2.0, h.shape[-1], dtype=h.dtype)
        return self.head(h @ weights)


class WeightStandardised(nn.Conv2d):
    """The weight is normalised before each use, as in Big Transfer and De et al."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = self.weight.var(dim=(1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / (variance + 1e-5).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def tanh_cnn() -> nn.Module:
    """The shape of Papernot et al.'s MNIST network, smaller."""
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(4, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )


def model(name: str, convolution: Callable[[], nn.Module], channels: int, x: Tensor) -> SmallModel:
    return SmallModel(
        name=name,
        build=lambda: Pooled(convolution(), channels),
        inputs=x,
        targets=Y,
        loss_fn=F.cross_entropy,
    )


MODELS = (
    model("conv1d", lambda: nn.Conv1d(4, 3, 3), 3, X1),
    model("conv2d", lambda: nn.Conv2d(4, 3, (3, 2), padding=1), 3, X2),
    model("conv2d_without_bias", lambda: nn.Conv2d(4, 3, 1, bias=False), 3, X2),
    model("conv3d", lambda: nn.Conv3d(2, 3, 2), 3, X3),
    model("conv_transpose1d", lambda: nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1), 3, X1),
    model("conv_transpose2d", lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), 6, X2),
    model("conv_transpose3d", lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), 3, X3),
    model("conv2d_grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), 6, X2),
    model("conv2d_depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4), 8, X2),
    model("conv1d_depthwise", lambda: nn.Conv1d(4, 4, 3, groups=4, padding=1), 4, X1),
    model("conv2d_dilated", lambda: nn.Conv2d(4, 3, 3, dilation=2), 3, X2),
    model("conv2d_strided", lambda: nn.Conv2d(4, 3, 3, stride=(2, 3), padding=(0, 2)), 3, X2),
    model("conv2d_padding_same", lambda: nn.Conv2d(4, 3, (2, 3), padding="same"), 3, X2),
    model(
        "conv1d_strided_dilated_grouped",
        lambda: nn.Conv1d(4, 6, 2, stride=2, dilation=2, groups=2, padding=1),
        6,
        X1,
    ),
    *(
        model(
            f"conv{rank}d_padding_{mode}",
            lambda rank=rank, mode=mode, x=x: getattr(nn, f"Conv{rank}d")(
                x.shape[1], 3, 3, padding=1, padding_mode=mode
            ),
            3,
            x,
        )
        for rank, x in ((1, X1), (2, X2), (3, X3))
        for mode in ("zeros", "reflect", "replicate", "circular")
    ),
    model("weight_standardisation", lambda: WeightStandardised(4, 3, 3, padding=1), 3, X2),
    SmallModel(name="tanh_cnn", build=tanh_cnn, inputs=X2, targets=Y, loss_fn=F.cross_entropy),
)
