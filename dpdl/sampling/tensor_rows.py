"""Batches of a `TensorDataset` read by one indexing of each tensor, in place of one of each example.

An ordinary loader asks the dataset for each example and stacks what it gets: some microseconds an example, more than
a small model takes to train on it. The batches are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

__all__ = ["by_rows"]

Collate = Callable[[Any], Any]


def by_rows(dataset: Dataset[Any], collate: Collate | None) -> tuple[Dataset[Any], Collate | None]:
    """The dataset and collate function to make a `DataLoader` of: others, if its batches can be read at once.

    That is so for a `TensorDataset` itself (a subclass may do anything for an example) and torch's own collate
    function.

    Args:
        dataset: what the loader was made of.
        collate: its collate function; None stands for torch's own.
    """
    if type(dataset) is not TensorDataset or (collate is not None and collate is not default_collate):
        return dataset, collate
    return _Rows(dataset), _as_it_is


class _Rows(Dataset[Any]):
    """A dataset that answers a loader's question for a whole batch."""

    def __init__(self, dataset: TensorDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """Rows of each tensor, as `default_collate` would stack them: [len(indices), ...], contiguous."""
        rows = torch.tensor(indices)
        return [tensor.index_select(0, rows.to(tensor.device)) for tensor in self._dataset.tensors]


def _as_it_is(batch: Any) -> Any:
    return batch
