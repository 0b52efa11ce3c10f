"""Numbers as people read them, rounded to the side that keeps the claim true."""

from __future__ import annotations

import decimal
import math

from accountants.interval import Interval


def rounded_up(value: float, digits: int = 5) -> str:
    """`value` to `digits` significant digits, never below it."""
    return _rounded(value, decimal.ROUND_CEILING, digits)


def rounded_down(value: float, digits: int = 5) -> str:
    """`value` to `digits` significant digits, never above it."""
    return _rounded(value, decimal.ROUND_FLOOR, digits)


def percent_up(value: float, digits: int = 4) -> str:
    """A probability as a percentage with `digits` significant digits, never below it.

    Example:
        >>> percent_up(0.0123456), percent_up(1.0), percent_up(1e-9)
        ('1.235 %', '100 %', '1.001e-7 %')
    """
    exact = decimal.Decimal(value).scaleb(2)
    short = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING).create_decimal(exact)
    shown = min(short, decimal.Decimal(100)).normalize()
    return f"{shown:f} %" if shown == 0 or shown > decimal.Decimal("1e-5") else f"{shown:e} %"


def bounds(interval: Interval) -> str:
    """Both ends of a bound on epsilon, rounded outwards."""
    if interval.upper == math.inf:
        return "infinite: no privacy"
    return f"<= {rounded_up(interval.upper)}, and not below {rounded_down(interval.lower)}"


def _rounded(value: float, direction: str, digits: int) -> str:
    """Without an exponent for everyday sizes."""
    if value == 0 or math.isinf(value):
        return "0" if value == 0 else "inf"
    short = decimal.Context(prec=digits, rounding=direction).create_decimal(decimal.Decimal(repr(value)))
    return f"{short:f}" if 1e-6 < value < 1e9 else str(short)
