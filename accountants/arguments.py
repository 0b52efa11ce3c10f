"""Checks of the numbers that a guarantee depends on: each refusal names the argument, the value, the remedy."""

from __future__ import annotations

import math
import operator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accountants.errors import ParameterError

Array = NDArray[np.float64]

MOST = 10**15  # of anything counted: more than any run takes, and exact as a double
LEAST_DELTA = 1e-300  # smaller ones leave the range of a double on the way

_BOOLEANS = {"bool", "bool_"}  # Python's and numpy's, the latter by both its names
_SHOWN = 100  # characters of a refused value


def real(name: str, value: object, *, remedy: str) -> float:
    """`value` as a finite-or-infinite float, from any scalar; refuses NaN, strings, booleans, complex numbers."""
    if isinstance(value, (str, bytes)) or _is_boolean(value):
        raise ParameterError(f"{name} must be a number, got {shown(value)}. {remedy}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ParameterError(f"{name} must be a number, got {shown(value)}. {remedy}") from None
    if math.isnan(number):
        raise ParameterError(f"{name} must be a number, got NaN. {remedy}")
    return number


def whole(name: str, value: object, *, remedy: str) -> int:
    """`value` as a non-negative int; takes numpy integers, refuses booleans and floats such as 3.0."""
    if _is_boolean(value):
        raise ParameterError(f"{name} must be a whole number, got {shown(value)}. {remedy}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ParameterError(f"{name} must be an int, got {shown(value)}. {remedy}") from None
    if number < 0:
        raise ParameterError(f"{name} must be >= 0, got {shown(number)}. {remedy}")
    if number > MOST:
        raise ParameterError(f"{name} must be at most 10^15, got {shown(number)}. {remedy}")
    return number


def reals(name: str, value: ArrayLike, *, remedy: str, nan_allowed: bool = False) -> Array:
    """`value` as float64 of any shape; refuses NaN, strings, booleans, complex numbers, objects and ragged lists."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ParameterError(f"{name} must be numbers, got {shown(value)}. {remedy}") from None
    if array.dtype.kind not in "iuf" or _holds_boolean(value):
        raise ParameterError(f"{name} must be numbers, got {shown(value)}. {remedy}")
    numbers = array.astype(np.float64)
    if not nan_allowed and np.isnan(numbers).any():
        raise ParameterError(f"{name} must be numbers, got NaN among {shown(value)}. {remedy}")
    return numbers


def probabilities(name: str, value: ArrayLike, *, remedy: str) -> Array:
    """`value` as floats in [0, 1], any shape."""
    numbers = reals(name, value, remedy=remedy)
    if not np.all((numbers >= 0) & (numbers <= 1)):
        raise ParameterError(f"{name} must be in [0, 1], got {shown(value)}. {remedy}")
    return numbers


def orders(value: ArrayLike, name: str = "orders") -> Array:
    """Renyi orders: finite floats > 1, any shape."""
    remedy = "Give orders such as [1.5, 2, 64]."
    numbers = reals(name, value, remedy=remedy)
    if not np.all(np.isfinite(numbers) & (numbers > 1)):
        raise ParameterError(f"{name} must be finite and > 1, got {shown(value)}. {remedy}")
    return numbers


def shown(value: object) -> str:
    """`value` for an error message, shortened; Python refuses to write out long ints."""
    if isinstance(value, int) and abs(value) > MOST**2:
        return f"an int of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a long int, or deep nesting, inside
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _holds_boolean(value: object) -> bool:
    """Beside numbers in a list, where numpy would take it for 0 or 1."""
    if isinstance(value, (list, tuple)):
        return any(_holds_boolean(member) for member in value)
    return _is_boolean(value)


def _is_boolean(value: object) -> bool:
    """Python's, numpy's, or a tensor of one boolean."""
    return type(value).__name__ in _BOOLEANS or str(getattr(value, "dtype", "")).endswith("bool")


def positive_whole(name: str, value: object, *, remedy: str) -> int:
    """`value` as an int >= 1."""
    number = whole(name, value, remedy=remedy)
    if number == 0:
        raise ParameterError(f"{name} must be >= 1, got 0. {remedy}")
    return number


def non_negative(name: str, value: object, *, remedy: str) -> float:
    """`value` as a finite float >= 0."""
    number = real(name, value, remedy=remedy)
    if not 0 <= number < math.inf:
        raise ParameterError(f"{name} must be >= 0 and finite, got {number!r}. {remedy}")
    return number


def probability(name: str, value: object, *, remedy: str) -> float:
    """`value` as a float in [0, 1]."""
    number = real(name, value, remedy=remedy)
    if not 0 <= number <= 1:
        raise ParameterError(f"{name} must be in [0, 1], got {number!r}. {remedy}")
    return number


def noise_scale(name: str, value: object) -> float:
    """A finite noise scale >= 0, in units of the sensitivity."""
    remedy = "Give the noise's scale divided by the clip norm, for example 1.0; 0 means no noise and no privacy."
    return non_negative(name, value, remedy=remedy)


def sample_rate(value: object) -> float:
    """A probability: that any one example is in a batch."""
    remedy = "Give expected batch size / number of examples, for example 256 / 60_000."
    return probability("sample_rate", value, remedy=remedy)


def steps(value: object, name: str = "steps") -> int:
    """A number of noisy steps."""
    return whole(name, value, remedy="Count the noisy steps taken, for example epochs * ceil(n / batch_size).")


def delta(value: object) -> float:
    """A delta strictly between 0 and 1, not so small that bounds on it leave the range of a double."""
    remedy = "Choose it well below 1 / (number of examples), for example 1e-6."
    number = real("delta", value, remedy=remedy)
    if not 0 < number < 1:
        raise ParameterError(f"delta must be in (0, 1), both ends excluded, got {number!r}. {remedy}")
    if number < LEAST_DELTA:
        raise ParameterError(f"delta must be at least {LEAST_DELTA}, got {number!r}. {remedy}")
    return number


def epsilon(value: object) -> float:
    """A finite epsilon >= 0."""
    return non_negative("epsilon", value, remedy="Give a privacy budget such as 3.0.")
