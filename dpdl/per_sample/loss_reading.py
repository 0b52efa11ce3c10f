"""How what a loss takes from the batch, without its being marked, may follow the batch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["FIXED", "READINGS", "READINGS_OF_SEVERAL", "Reading", "may_be_recognised"]

Rows = Literal["multiple", "blocks", "equal", "everywhere", "none"]

# Numbers that a loss also uses as axes, signs and factors: that one of them was read from a tensor says nothing of
# where it went.
SMALL = range(-4, 5)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is taken to follow the batch, among what does not say so.

    Attributes:
        rows: which other tensors: those whose first axis is of length N, or of a multiple of it too, where each
            example's rows follow each other ("multiple") or the batch is repeated as a whole ("blocks"); those with
            an axis of length N anywhere, in each such axis ("everywhere"); or none.
        numbers: which Python numbers: those equal to N, multiples of it too, or none.
        items: whether a number that was read from a followed tensor is recognised by its value.
    """

    rows: Rows
    numbers: Literal["multiple", "equal", "none"]
    items: bool

    def rows_of(self, tensor: Tensor, size: int, rows: Tensor) -> Tensor:
        """What a tensor among `size` examples would be among those numbered by `rows`."""
        rows = rows.to(tensor.device)
        for axis, form in enumerate(self._forms(tensor, size)):
            if form == "multiple":
                tensor = tensor.unflatten(axis, (size, -1)).index_select(axis, rows).flatten(axis, axis + 1)
            elif form == "blocks":
                tensor = tensor.unflatten(axis, (-1, size)).index_select(axis + 1, rows).flatten(axis, axis + 1)
        return tensor

    def effect_on(self, tensor: Tensor, size: int) -> Hashable:
        """What tells apart two readings of a tensor: equal values, equal rows."""
        return self._forms(tensor, size)

    def _forms(self, tensor: Tensor, size: int) -> tuple[Literal["multiple", "blocks"] | None, ...]:
        """For each axis, how it follows the batch."""
        if self.rows == "everywhere":
            return tuple("multiple" if length == size else None for length in tensor.shape)
        length, others = tensor.shape[0], (None,) * (tensor.ndim - 1)
        if length == size and self.rows != "none":
            return ("multiple", *others)
        if length and length % size == 0 and (self.rows == "multiple" or self.rows == "blocks"):
            return (self.rows, *others)
        return (None, *others)

    def number(self, value: float, size: int, part: int) -> float:
        """What a number among `size` examples would be among `part` of them."""
        follows = value == size if self.numbers == "equal" else value > 0 and value % size == 0
        return type(value)(value / size * part) if follows and self.numbers != "none" else value

    def recognises(self, value: float, size: int) -> bool:
        """Whether a number that was read from a tensor is known again by its value; a multiple of N is as any other."""
        return self.items and may_be_recognised(value, size)


def may_be_recognised(value: float, size: int) -> bool:
    """Whether a number is so rare that where it comes again it is the one that was read."""
    return value not in SMALL and value % size != 0


def _readings(rows: tuple[Rows, ...]) -> tuple[Reading, ...]:
    return tuple(
        Reading(rows=rule, numbers=numbers, items=items)
        for items in (True, False)
        for rule in rows
        for numbers in ("multiple", "equal", "none")
    )


READINGS = _readings(("multiple", "equal", "everywhere", "none"))
# Outputs of several forward passes are put one after another, as are their targets.
READINGS_OF_SEVERAL = _readings(("multiple", "blocks", "equal", "everywhere", "none"))

# The batch keeps its size, and the examples that are looked at keep their places: nothing unmarked has to follow.
FIXED = tuple(Reading(rows="none", numbers="none", items=items) for items in (True, False))
