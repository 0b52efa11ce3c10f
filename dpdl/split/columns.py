"""One party's data: named columns over the same rows.

    columns = Columns({"x": images, "y": labels})
    columns = Columns.of_dataset(dataset, names=("x", "y"))

Row n of every column, of every party, is the same record: who holds what of a record is settled before (private set
intersection is not part of this package).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from dpdl.errors import DataError, ParameterError

__all__ = ["Columns"]

Take = Callable[[Tensor], Mapping[str, Tensor]]


class Columns:
    """Rows by number.

    Args:
        tensors: column to a tensor [n, ...], rows first, all of one length.

    Raises:
        ParameterError: there is none, or they are of several lengths.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.ndim == 0:
                raise ParameterError(f"Column '{name}' must be a tensor with rows first, got {_described(tensor)}.")
            if tensor.requires_grad:
                raise ParameterError(f"Column '{name}' requires a gradient. Give data: tensor.detach().")
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) != 1:
            raise ParameterError(
                f"Columns of one party have the same rows, at least one column, got lengths {lengths}."
            )
        self._length = next(iter(lengths.values()))
        tensors = dict(tensors)
        self.names = tuple(tensors)
        self._take: Take = lambda rows: {name: tensor[rows] for name, tensor in tensors.items()}

    @classmethod
    def of_dataset(
        cls, dataset: Any, *, names: Sequence[str], collate: Callable[[list[Any]], Any] = default_collate
    ) -> Columns:
        """The columns of a map-style dataset, read row by row when they are needed.

        Args:
            dataset: has a length and items by number.
            names: of what collate returns, in order; where that is a mapping, its keys.
            collate: items to a batch.
        """
        columns = cls.__new__(cls)
        columns._length = len(dataset)
        columns.names = tuple(names)

        def take(rows: Tensor) -> Mapping[str, Tensor]:
            numbers = rows.tolist()
            found = collate([dataset[number] for number in numbers or [0]])
            values = [found[name] for name in names] if isinstance(found, Mapping) else found
            kept = slice(None) if numbers else slice(0)  # no rows: the first one's shapes, without it
            return {name: value[kept] for name, value in zip(names, values, strict=True)}

        columns._take = take
        return columns

    def __len__(self) -> int:
        return self._length

    def rows(self, numbers: Tensor) -> dict[str, Tensor]:
        """The rows of these numbers: by column, a tensor [k, ...] for `numbers` of shape [k], int64.

        Raises:
            DataError: a number is out of range, or the data does not have that many rows.
        """
        if numbers.ndim != 1 or numbers.dtype != torch.int64:
            raise DataError(f"Rows are asked for by whole numbers, got {_described(numbers)} of {numbers.dtype}.")
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < self._length:
            raise DataError(
                f"Rows are numbered from 0 to {self._length - 1}; got one outside. Align the parties' data."
            )
        found = dict(self._take(numbers))
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor) or len(tensor) != len(numbers):
                raise DataError(f"Column '{name}' gave {_described(tensor)} for {len(numbers)} rows.")
        return found

    def made_up(self, count: int, *, seed: int, exchanged: int | None = None) -> dict[str, Tensor]:
        """Rows of these shapes that are nobody's.

        Args:
            count: how many.
            seed: the same seed, the same rows.
            exchanged: one row that is another than it would be.

        Returns:
            By column, shape [count, ...].

        Raises:
            DataError: the data gives something else than rows.
        """
        generator = torch.Generator().manual_seed(seed)
        return {name: _made_up(t, count, generator, exchanged) for name, t in self.rows(torch.arange(0)).items()}


def _made_up(like: Tensor, count: int, generator: torch.Generator, exchanged: int | None) -> Tensor:
    """Normals; whole numbers and truth values, which may be classes or words, are 0, and 1 in the exchanged row."""
    shape = (count, *like.shape[1:])
    rows = torch.zeros(shape, dtype=like.dtype)
    if like.is_floating_point():
        rows = torch.randn(shape, generator=generator, dtype=torch.float64).to(like.dtype)
    if exchanged is not None:
        rows[exchanged] = -rows[exchanged] if like.is_floating_point() else 1
    return rows.to(like.device)


def _described(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
