"""Modules in which examples meet, or that keep what they saw, each inside a model under the path `body.bad`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from tests.small_run import CLASSES, FEATURES

Kind = Literal["mixes examples", "keeps state"]


class CentredOverBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class SoftmaxOverBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.softmax(0)


class ScaledByBatchMaximum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax()


class AttentionAcrossExamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.query(x) @ x.T).softmax(1) @ x


class SumOfPrevious(nn.Module):
    """One-sided: an example reaches only those after it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0)


class BatchTakenForTime(nn.Module):
    """An LSTM without batch_first and without a batch axis: the examples are its time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class RunningMeanInBuffer(nn.Module):
    """Writes to a buffer that its output does not depend on: nothing mixes, yet the data stays."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.mul_(0.9).add_(0.1 * x.detach().mean(0).to(self.seen.dtype))
        return x


class ReassignedBuffer(RunningMeanInBuffer):
    """Puts a new tensor in the buffer's place instead of writing to the old one."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.detach().mean(0)
        return x


class RunningMeanInAttribute(nn.Module):
    """State that is not even a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class InstanceNormThatTracks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(1, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.unsqueeze(1)).squeeze(1)


def model_with(bad: nn.Module) -> nn.Module:
    """A model whose submodule `body.bad` is the culprit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(41)
        model = nn.Module()
        model.body = nn.Sequential()
        model.body.add_module("first", nn.Linear(FEATURES, FEATURES))
        model.body.add_module("bad", bad)
        model.body.add_module("last", nn.Linear(FEATURES, CLASSES))
    model.forward = model.body.forward
    return model.double()


def batch_norm(**settings: bool) -> Callable[[], nn.Module]:
    return lambda: nn.BatchNorm1d(FEATURES, **settings)


def frozen_batch_norm() -> nn.Module:
    return nn.BatchNorm1d(FEATURES).requires_grad_(False)


BATCH_NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": batch_norm(),
    "BatchNorm1d without parameters": batch_norm(affine=False),
    "BatchNorm1d without statistics": batch_norm(track_running_stats=False),
    "BatchNorm1d with frozen parameters": frozen_batch_norm,
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(FEATURES),
}

MIXERS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        CentredOverBatch,
        SoftmaxOverBatch,
        ScaledByBatchMaximum,
        AttentionAcrossExamples,
        SumOfPrevious,
        BatchTakenForTime,
        RunningMeanInAttribute,
    )
}

KEEPERS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind for kind in (RunningMeanInBuffer, InstanceNormThatTracks)
}
