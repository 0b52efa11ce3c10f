"""How what a loss takes from the batch, without its being marked, may follow the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["READINGS", "READINGS_OF_SEVERAL", "Reading"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is taken to follow the batch, among what does not say so.

    Attributes:
        rows: which lengths of other tensors' first axis: those equal to N, or multiples of it too, where each
            example's rows follow each other ("multiple") or the batch is repeated as a whole ("blocks").
        numbers: which Python numbers: the same, or none.
        items: whether a number that was read from a followed tensor is recognised by its value.
    """

    rows: Literal["multiple", "blocks", "equal"]
    numbers: Literal["multiple", "equal", "none"]
    items: bool

    def rows_of(self, tensor: Tensor, size: int, part: int) -> Tensor:
        """What a tensor among `size` examples would be among the first `part`."""
        kept = self.kept(tensor.shape[0], size, part)
        return torch.cat([block[:part] for block in tensor.split(size)]) if kept is None else tensor[:kept]

    def kept(self, length: int, size: int, part: int) -> int | None:
        """How many of a tensor's first rows that are; None where they are not the first ones."""
        if self.rows != "blocks":
            return int(_scaled(length, size, part, self.rows))
        if length in (0, size):
            return min(length, part)
        return length if length % size else None

    def number(self, value: float, size: int, part: int) -> float:
        """The same of a number."""
        return type(value)(_scaled(value, size, part, self.numbers))


def _scaled(value: float, size: int, part: int, rule: Literal["multiple", "equal", "none"]) -> float:
    follows = value == size if rule == "equal" else rule == "multiple" and value > 0 and value % size == 0
    return value / size * part if follows else value


def _readings(rows: tuple[Literal["multiple", "blocks", "equal"], ...]) -> tuple[Reading, ...]:
    return tuple(
        Reading(rows=rule, numbers=numbers, items=items)
        for items in (True, False)
        for rule in rows
        for numbers in ("multiple", "equal", "none")
    )


READINGS = _readings(("multiple", "equal"))
# Outputs of several forward passes are put one after another, as are their targets.
READINGS_OF_SEVERAL = _readings(("multiple", "blocks", "equal"))
