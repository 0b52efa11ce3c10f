"""How a row is named: by a whole number or a text that stays with the record, never by its place in a batch."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import Tensor

from dpdl.errors import ParameterError

__all__ = ["RowId", "row_ids"]

RowId = int | str


def row_ids(ids: Sequence[object] | Tensor) -> list[RowId]:
    """Names of rows, as plain values.

    Args:
        ids: whole numbers (of Python, numpy or torch) and texts.

    Raises:
        ParameterError: something else is among them.
    """
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    return [_row_id(name) for name in ids]


def _row_id(name: object) -> RowId:
    if isinstance(name, str) and name:
        return str(name)
    if not isinstance(name, bool | float) and hasattr(name, "__index__"):
        return operator.index(name)
    raise ParameterError(
        f"A row is named by a whole number or a text that stays with its record, got {name!r} ({type(name).__name__}). "
        "Without such names nobody can count how often a row was released."
    )
