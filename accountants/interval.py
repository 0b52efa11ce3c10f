"""What is known about a number: a lower and an upper bound."""

from __future__ import annotations

from typing import NamedTuple


class Interval(NamedTuple):
    """A number known to lie in [`lower`, `upper`]; `upper` is the one that a privacy claim may quote."""

    lower: float
    upper: float
