"""Canaries: examples that an audit adds to the data, each by its own fair coin, and the coins.

    canaries = Canaries.with_fair_coins(*mislabelled(x_extra, y_extra, classes=10))
    train_on(canaries.joined(dataset))          # the private data, and the canaries whose coin says so

Whatever the run releases says something of the coins; how much, is what `audit_one_run` measures. Canaries are ordinary
examples of the private data set for as long as the run lasts: they are sampled, clipped and noised like all others, and
what they cost in accuracy is the price of the audit.

Private: the coins, until the audit is over; the training code must not see them. The examples are public.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from dpdl.errors import ParameterError
from dpdl.secure_random import RandomStream

__all__ = ["Canaries", "fair_coins", "mislabelled"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Canaries:
    """Candidates, and whether each is in the data.

    Attributes:
        examples: shape [m, ...]; no two alike, or nobody could tell which of them is in.
        labels: shape [m, ...].
        coins: shape [m], bool: fair, independent of each other and of all else.

    Raises:
        ParameterError: shapes do not fit.
    """

    examples: Tensor
    labels: Tensor
    coins: Tensor

    def __post_init__(self) -> None:
        count = len(self.examples)
        if self.coins.dtype != torch.bool or self.coins.shape != (count,) or len(self.labels) != count or not count:
            raise ParameterError(
                f"{count} examples need as many labels and bool coins, got labels {tuple(self.labels.shape)} and "
                f"coins {tuple(self.coins.shape)} of {self.coins.dtype}."
            )

    @classmethod
    def with_fair_coins(cls, examples: Tensor, labels: Tensor, *, insecure_seed: int | None = None) -> Canaries:
        """Toss the coins.

        Args:
            examples: shape [m, ...].
            labels: shape [m].
            insecure_seed: makes the coins reproducible; by default they come from the operating system.

        Raises:
            ParameterError: there is no canary, or not one label for each.
        """
        return cls(examples=examples, labels=labels, coins=fair_coins(len(examples), insecure_seed=insecure_seed))

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def included(self) -> TensorDataset:
        """Those whose coin says so."""
        return TensorDataset(self.examples[self.coins], self.labels[self.coins])

    def joined(self, dataset: Dataset[Any]) -> Dataset[Any]:
        """The private data, `dataset`, and the included canaries: what is to be trained on."""
        return ConcatDataset([dataset, self.included]) if bool(self.coins.any()) else dataset


def fair_coins(count: int, *, insecure_seed: int | None = None) -> Tensor:
    """Independent fair coins, shape [count], bool.

    Args:
        count: how many, >= 1.
        insecure_seed: makes them reproducible; by default they come from the operating system.

    Raises:
        ParameterError: count is not positive.
    """
    if count < 1:
        raise ParameterError(f"An audit needs canaries, got {count}.")
    stream = RandomStream.from_os() if insecure_seed is None else RandomStream.from_insecure_seed(insecure_seed)
    words = stream.child("audit coins").words(count, message=0)
    return torch.from_numpy((words & np.uint64(1)).astype(np.bool_))


def mislabelled(examples: Tensor, labels: Tensor, *, classes: int) -> tuple[Tensor, Tensor]:
    """Examples with a wrong label each: nobody would predict it who was not taught to.

    Args:
        examples: shape [m, ...], not from the private data: of the same kind, and public.
        labels: shape [m], the true ones, whole numbers in [0, classes).
        classes: >= 2.

    Returns:
        (examples, labels), shaped as they came, the labels moved on by 1 to classes - 1 places, not all by the same.

    Raises:
        ParameterError: labels or classes do not fit.
    """
    if classes < 2 or labels.is_floating_point() or labels.shape != (len(examples),):
        raise ParameterError(
            f"mislabelled needs whole labels of shape ({len(examples)},) and classes >= 2, got {labels.dtype} of shape "
            f"{tuple(labels.shape)} and {classes}."
        )
    places = 1 + torch.arange(len(labels), device=labels.device) % (classes - 1)
    return examples, (labels + places.to(labels.dtype)) % classes
