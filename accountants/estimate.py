"""A number that is neither an upper nor a lower bound, typed so that it cannot pass for one.

Whatever arithmetic is done with an estimate gives an estimate; printing one, in an f-string too, marks it with "~".
`float(estimate)` is the way to a plain number, and has to be written. Some places see a plain number all the same,
because they ask the double underneath and not the class: comparisons, `json.dumps`, the functions of `math`, arrays of
estimates. A caller who promises privacy therefore asks an accountant for its `interval`, which no estimate has.

Example:
    >>> epsilon = Estimate(3.06)
    >>> epsilon, str(epsilon), f"{2 * epsilon:.1f}"
    (Estimate(3.06), '~3.06 (an estimate, not a bound)', '~6.1')
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _kept(operation: Callable[..., Any]) -> Any:
    """The float's own operation with its result typed as an estimate."""

    def method(self: Estimate, *operands: Any) -> Any:
        result = operation(self, *operands)
        return Estimate(result) if isinstance(result, float) else result

    method.__name__ = operation.__name__
    return method


class Estimate(float):
    """A float that claims nothing: the truth may lie on either side of it."""

    __slots__ = ()
    __array_ufunc__ = None  # numpy's scalars and arrays leave the arithmetic to the methods below, or refuse

    __add__ = __radd__ = _kept(float.__add__)
    __sub__, __rsub__ = _kept(float.__sub__), _kept(float.__rsub__)
    __mul__ = __rmul__ = _kept(float.__mul__)
    __truediv__, __rtruediv__ = _kept(float.__truediv__), _kept(float.__rtruediv__)
    __floordiv__, __rfloordiv__ = _kept(float.__floordiv__), _kept(float.__rfloordiv__)
    __mod__, __rmod__ = _kept(float.__mod__), _kept(float.__rmod__)
    __pow__, __rpow__ = _kept(float.__pow__), _kept(float.__rpow__)
    __neg__, __pos__, __abs__ = _kept(float.__neg__), _kept(float.__pos__), _kept(float.__abs__)
    __round__ = _kept(float.__round__)

    def __repr__(self) -> str:
        return f"Estimate({float(self)!r})"

    def __str__(self) -> str:
        return f"~{float(self):.4g} (an estimate, not a bound)"

    def __format__(self, spec: str) -> str:
        return f"~{float(self):{spec}}" if spec else str(self)
