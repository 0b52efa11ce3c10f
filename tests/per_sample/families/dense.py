"""Linear layers, activations and losses."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.per_sample.case import N, SmallModel, cross_entropy_sum, mse_sum, normal, tokens

X = normal(N, 6, seed=1)
Y = tokens(N, vocabulary=4, seed=2)


class ScaledLogits(nn.Module):
    """A bias and a temperature that are numbers, not vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.bias = nn.Parameter(torch.tensor(0.3))
        self.log_temperature = nn.Parameter(torch.tensor(-0.2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) + self.bias) ** 2 * self.log_temperature.exp()


class BilinearPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(3, 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x[:, :3], x[:, 3:])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x).tanh()
        x = x + self.second(x).tanh()
        return self.head(x)


class LinearOverPositions(nn.Module):
    """[N, T, d] through one linear, then a mean over T: the norm needs the cross terms over T."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).tanh().mean(1))


def mse_mean_and_penalty(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over examples of something that is no standard loss."""
    return ((outputs - targets).square().sum(1) + outputs.abs().sum(1).log1p()).mean()


def nested() -> nn.Module:
    inner = nn.Sequential(nn.GELU(), nn.Sequential(nn.Linear(6, 6), nn.SiLU()))
    return nn.Sequential(nn.Sequential(nn.Linear(6, 6), inner), nn.Linear(6, 4))


model = partial(SmallModel, inputs=X, targets=Y, loss_fn=F.cross_entropy)


MODELS = (
    model(name="linear_without_bias", build=lambda: nn.Linear(6, 4, bias=False)),
    model(
        name="linear_mse_sum",
        build=lambda: nn.Linear(6, 2),
        targets=normal(N, 2, seed=3),
        loss_fn=mse_sum,
        loss_reduction="sum",
    ),
    model(name="mlp_tanh", build=lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))),
    model(
        name="mlp_cross_entropy_sum",
        build=lambda: nn.Sequential(nn.Linear(6, 8), nn.ELU(), nn.Linear(8, 4)),
        loss_fn=cross_entropy_sum,
        loss_reduction="sum",
    ),
    model(
        name="mlp_mse_mean",
        build=lambda: nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3)),
        targets=normal(N, 3, seed=4),
        loss_fn=F.mse_loss,
    ),
    model(
        name="mlp_bce_with_logits",
        build=lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)),
        targets=tokens(N, vocabulary=2, seed=5).double(),
        loss_fn=F.binary_cross_entropy_with_logits,
    ),
    model(name="mlp_nll", build=lambda: nn.Sequential(nn.Linear(6, 4), nn.LogSoftmax(dim=1)), loss_fn=F.nll_loss),
    model(
        name="mlp_own_loss",
        build=lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        targets=normal(N, 3, seed=6),
        loss_fn=mse_mean_and_penalty,
    ),
    model(
        name="prelu_shared_by_all_channels",
        build=lambda: nn.Sequential(nn.Linear(6, 8), nn.PReLU(), nn.Linear(8, 4)),
    ),
    model(name="prelu_per_channel", build=lambda: nn.Sequential(nn.Linear(6, 8), nn.PReLU(8), nn.Linear(8, 4))),
    model(name="bilinear", build=BilinearPair),
    model(name="residual", build=Residual),
    model(name="nested_modules", build=nested),
    model(name="scalar_parameters", build=ScaledLogits),
    model(
        name="linear_over_positions",
        build=LinearOverPositions,
        inputs=normal(N, N, 3, seed=7),
        notes="as many positions as examples: guessing the batch axis by its length goes wrong",
    ),
)
