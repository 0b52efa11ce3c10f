"""Numbers as people read them, rounded to the side that keeps the claim true."""

from __future__ import annotations

import decimal
import math

from accountants.interval import Interval


def rounded_up(value: float, digits: int = 5) -> str:
    """`value` to `digits` significant digits, never below it.

    Example:
        >>> rounded_up(2.38512156), rounded_up(3.0), rounded_up(1.23456789e9), rounded_up(1e-7)
        ('2.3852', '3.0', '1.2346e+09', '1e-07')
    """
    return _rounded(value, decimal.ROUND_CEILING, digits)


def rounded_down(value: float, digits: int = 5) -> str:
    """`value` to `digits` significant digits, never above it."""
    return _rounded(value, decimal.ROUND_FLOOR, digits)


def percent_up(value: float, digits: int = 4) -> str:
    """A probability as a percentage with `digits` significant digits, never below it.

    Example:
        >>> percent_up(0.0123456), percent_up(1.0), percent_up(1e-9), percent_up(0.7)
        ('1.235 %', '100 %', '1e-07 %', '70 %')
    """
    short = _short(value, decimal.ROUND_CEILING, digits).scaleb(2)
    return f"{_written(min(short, decimal.Decimal(100)).normalize())} %"


def bounds(interval: Interval) -> str:
    """Both ends of a bound on epsilon, rounded outwards."""
    if interval.upper == math.inf:
        return "infinite: no privacy"
    return f"<= {rounded_up(interval.upper)}, and not below {rounded_down(interval.lower)}"


def _rounded(value: float, direction: str, digits: int) -> str:
    if value == 0 or math.isinf(value):
        return "0" if value == 0 else "inf"
    return _written(_short(value, direction, digits))


def _short(value: float, direction: str, digits: int) -> decimal.Decimal:
    """The decimal that Python shows for `value`, cut to `digits`: 0.7 is 0.7, not the double just below it."""
    exact = decimal.Decimal(repr(float(value)))
    return decimal.Context(prec=digits, rounding=direction).create_decimal(exact)


def _written(number: decimal.Decimal) -> str:
    """Without an exponent for everyday sizes; else as Python writes floats."""
    if number == 0 or decimal.Decimal("1e-4") <= number < decimal.Decimal("1e9"):
        return f"{number:f}"
    return f"{float(number):.{len(number.as_tuple().digits) - 1}e}"
