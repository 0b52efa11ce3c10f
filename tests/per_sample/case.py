"""One small model and its batch: what an engine gets, and which engines have to take it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles.one_at_a_time import Inputs, cast, map_inputs

ENGINES = ("loop", "vmap", "tape", "auto")

N = 5  # examples in every batch; several models also have a sequence of length 5, on purpose


@dataclass(frozen=True, kw_only=True)
class SmallModel:
    """A model, a batch, a loss.

    Attributes:
        name: Unique; the test's id and the seed of the weights.
        build: Makes the module.
        inputs: Batch first; a tuple is passed by position, a dict by keyword. Floats are float64.
        targets: Batch first.
        loss_fn: Of the whole batch, reduced as `loss_reduction` says.
        must_take: Engines that have to be exact. Any other engine may refuse instead, with a remedy.
        eval_mode: Gradients are taken in eval mode.
        notes: The trap, if its name does not say it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    targets: Tensor
    loss_fn: Callable[[Any, Tensor], Tensor]
    loss_reduction: Literal["mean", "sum"] = "mean"
    must_take: tuple[str, ...] = ENGINES
    eval_mode: bool = False
    notes: str = ""

    def module(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The same weights at every call, none of them at a special value such as 0 or 1."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model = self.build().double()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
        return model.to(dtype).train(not self.eval_mode)

    def batch(self, dtype: torch.dtype = torch.float64, rows: Tensor | slice = slice(None)) -> tuple[Inputs, Tensor]:
        """Inputs and targets, or some rows of them."""
        return (
            map_inputs(self.inputs, lambda t: cast(t[rows], dtype).clone()),
            cast(self.targets[rows], dtype).clone(),
        )


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Fixed standard normals, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Fixed integers in [0, vocabulary)."""
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def cross_entropy_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


def mse_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets, reduction="sum")


def language_model_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """The usual flattened loss: a mean over N * T tokens."""
    return F.cross_entropy(outputs.view(-1, outputs.shape[-1]), targets.view(-1))


def language_model_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    """The same, summed; padded tokens (target -1) count for nothing."""
    return F.cross_entropy(
        outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1), ignore_index=-1, reduction="sum"
    )
