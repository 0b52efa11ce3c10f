"""Canaries whose gradient is one direction of its own: the worst case that clipping and noise are there for.

    audited = GradientCanaries(model, count=1000)
    dataset = audited.joined(dataset)           # items (x, y) become ((x, k), y): k-th canary, or -1 for private ones
    ... make_private(audited, optimizer, loader over dataset, plan), the training loop as it was ...

The module holds the user's model and a table with one weight a canary. On a private example it is the model, and the
table has no gradient. On canary k the output is a constant, but its derivative by the k-th weight of the table is
large: the gradient has length `slope` times that of the loss, lies along the k-th weight, and is the same at every
step, so that it is clipped to exactly max_grad_norm, and no other example's gradient lies in its way. What the k-th
weight does is then a membership test of canary k against noise alone, as strong as the guarantee allows anybody to have
[1]; all m of them are in one run.

It sees faults of what all parameters have in common: sampling, clipping, noise, accounting. What goes wrong with one
layer of the model alone (a wrong per-sample gradient of a convolution) it does not see.

References:
    [1] Nasr, Song, Thakurta, Papernot, Carlini, Adversary Instantiation, 2021. arXiv:2101.04535, section 4 (gradient
        canaries).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from dpdl.audit.canaries import fair_coins
from dpdl.errors import ParameterError

__all__ = ["DirectionsOnly", "GradientCanaries"]

SLOPE = 1e4  # the loss's own derivative, for a class at a constant output, is 1/2 or more


class GradientCanaries(nn.Module):
    """A model, and canaries along directions of their own.

    Args:
        model: takes x, as the data set has it, in batches; returns a tensor with the batch first.
        count: canaries, >= 1.
        label: of each canary: class 0 (the default) under cross-entropy, or a target > 0 under squared error; whatever
            makes the loss's derivative by the first output negative.
        slope: how much longer a canary's gradient is than that of the loss by the output; the product must be above
            max_grad_norm.
        insecure_seed: makes the coins reproducible.

    Raises:
        ParameterError: slope is not positive, or count is not a whole number >= 1.

    References:
        Nasr, Song, Thakurta, Papernot, Carlini, 2021 (the module has it). arXiv:2101.04535, section 4.
    """

    def __init__(
        self, model: nn.Module, *, count: int, label: Any = 0, slope: float = SLOPE, insecure_seed: int | None = None
    ) -> None:
        super().__init__()
        if not slope > 0:
            raise ParameterError(f"slope must be > 0, got {slope!r}.")
        self.model = model
        self.coins = fair_coins(count, insecure_seed=insecure_seed)
        self.label = label
        self.slope = slope
        # One row more, without gradient, for all private examples.
        self.directions = nn.Embedding(count + 1, 1, padding_idx=count)
        nn.init.zeros_(self.directions.weight)

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        """(x, k) to the model's outputs for private rows, constants for canaries."""
        x, which = batch
        private = which < 0
        out = cast(Tensor, self.model(x))
        along = self.directions(torch.where(private, self.directions.num_embeddings - 1, which)).squeeze(1)
        # 0, with derivative `slope`.
        push = (self.slope * (along - along.detach())).to(out.dtype).reshape(-1, *[1] * (out.ndim - 1))
        first = torch.zeros(out.shape[1:], dtype=out.dtype, device=out.device)
        first.view(-1)[:1] = 1
        return torch.where(private.reshape(push.shape), out, push * first)

    @property
    def watched(self) -> Tensor:
        """The table, shape [count + 1, 1], for a `Transcript`; its last weight is no canary's."""
        return self.directions.weight

    def joined(self, dataset: Dataset[Any]) -> Dataset[Any]:
        """The private data, each with -1, and as many examples as there are canaries, on an x of zeros.

        For a canary whose coin says so it is the canary; for the others an example without any gradient, so that the
        number of examples, on which a plan depends, is the same whatever the coins are.

        Args:
            dataset: sized, of items (x, y), x a tensor.
        """
        x, y = dataset[0]
        canaries = _Canaries(torch.zeros_like(x), torch.full_like(torch.as_tensor(y), self.label), _numbers(self.coins))
        return ConcatDataset([_Numbered(dataset), canaries])


class DirectionsOnly(nn.Module):
    """The same canaries without a model or private examples: for training code that takes any model and data.

    x is the canary's number, shape [N], whole; the output has shape [N, outputs]. Nothing else is there, so that a run
    is fast and all that is released is about canaries.

    Args:
        count, label, slope, insecure_seed: as in `GradientCanaries`.
        outputs: >= 1: how many the loss expects.

    References:
        As `GradientCanaries`: arXiv:2101.04535, section 4.
    """

    def __init__(
        self,
        *,
        count: int,
        outputs: int = 2,
        label: Any = 0,
        slope: float = SLOPE,
        insecure_seed: int | None = None,
    ) -> None:
        super().__init__()
        self.coins = fair_coins(count, insecure_seed=insecure_seed)
        self.slope = slope
        self.outputs = outputs
        self.label = label
        self.directions = nn.Embedding(count + 1, 1, padding_idx=count)
        nn.init.zeros_(self.directions.weight)

    def forward(self, which: Tensor) -> Tensor:
        """Zeros, shape [N, outputs]; the derivative of the first by weight `which` is `slope`."""
        along = self.directions(which)
        push = self.slope * (along - along.detach())
        return F.pad(push, (0, self.outputs - 1))

    @property
    def watched(self) -> Tensor:
        """The table, shape [count + 1, 1], as in `GradientCanaries.watched`."""
        return self.directions.weight

    def dataset(self) -> TensorDataset:
        """Items (k, label), `count` of them: k-th canary if its coin says so, else an example without gradient."""
        numbers = torch.tensor(_numbers(self.coins))
        return TensorDataset(numbers, torch.as_tensor(self.label).expand(len(numbers)).clone())


def _numbers(coins: Tensor) -> list[int]:
    """Each canary's place in the table, or the place without gradient for those that stay out."""
    return torch.where(coins, torch.arange(len(coins)), len(coins)).tolist()


class _Numbered(Dataset[Any]):
    """Items ((x, -1), y)."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]  # sized, as documented

    def __getitem__(self, index: int) -> Any:
        x, y = self._dataset[index]
        return (x, -1), y


class _Canaries(Dataset[Any]):
    """Items ((zeros, k), label)."""

    def __init__(self, x: Tensor, y: Tensor, numbers: list[int]) -> None:
        self._x, self._y, self._numbers = x, y, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Any:
        return (self._x, self._numbers[index]), self._y
