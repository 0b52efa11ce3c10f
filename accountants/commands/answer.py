"""What a command answers: a record for programs, a text for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer, both ways.

    Attributes:
        record: names and numbers, unrounded.
        text: the same as a table, rounded to the safe side.
    """

    record: dict[str, Any]
    text: str

    def document(self) -> dict[str, Any]:
        """The record as JSON can hold it: infinite numbers are null, and "unbounded" says whether there are any.

        Example:
            >>> Answer({"epsilon": float("inf"), "delta": 1e-5}, "").document()
            {'epsilon': None, 'delta': 1e-05, 'unbounded': True}
        """
        plain = {name: _finite(value) for name, value in self.record.items()}
        return plain | {"unbounded": _is_unbounded(self.record)}


def aligned(rows: Sequence[Sequence[str]], *, numeric: bool = False) -> str:
    """Rows as columns of equal width; `numeric` ones are flush right.

    Example:
        >>> print(aligned([("steps", "epsilon"), ("9", "0.2"), ("10", "0.25")], numeric=True))
        steps  epsilon
            9      0.2
           10     0.25
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    place = str.rjust if numeric else str.ljust
    return "\n".join("  ".join(map(place, row, widths)).rstrip() for row in rows)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_finite(member) for member in value]
    return None if _is_infinite(value) else value


def _is_unbounded(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_unbounded, value.values()))
    return any(map(_is_unbounded, value)) if isinstance(value, list) else _is_infinite(value)


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and math.isinf(value)
