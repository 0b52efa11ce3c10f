"""What the sweeps of the command line train on: inputs and labels, some to train on and some held out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Task"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A classification task in memory.

    Attributes:
        train_inputs, test_inputs: shapes [N, C, H, W] and [M, C, H, W], float32.
        train_labels, test_labels: shapes [N] and [M], int64.
        classes: how many.
        name: in titles.
    """

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int
    name: str

    def __str__(self) -> str:
        shape = "x".join(str(size) for size in self.train_inputs.shape[1:])
        counts = f"{len(self.train_labels):,} records to train on, {len(self.test_labels):,} held out"
        return f"{self.name}: {counts}, inputs of {shape}, {self.classes} classes"
