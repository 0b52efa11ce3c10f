"""Tables and numbers in Markdown, for the page of benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["number", "percent", "short", "table"]

NONE = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with its first column to the left and the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def number(value: float | None, digits: int = 2) -> str:
    """With a fixed number of digits after the point."""
    return NONE if value is None else f"{value:.{digits}f}"


def short(value: float | None) -> str:
    """With three digits that count, however large or small."""
    if value is None:
        return NONE
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"


def percent(value: float | None) -> str:
    """Of one, with one digit after the point."""
    return NONE if value is None else f"{100 * value:.1f} %"
