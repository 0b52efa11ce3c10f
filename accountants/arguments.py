"""Checks of the numbers that a guarantee depends on: each refusal names the argument, the value, the remedy."""

from __future__ import annotations

import math
import operator

from accountants.errors import ParameterError

_BOOLEANS = {"bool", "bool_"}  # Python's and numpy's, the latter by both its names


def real(name: str, value: object, *, remedy: str) -> float:
    """`value` as a finite-or-infinite float, from any scalar; refuses NaN, strings, booleans, complex numbers."""
    if isinstance(value, (str, bytes)) or _is_boolean(value):
        raise ParameterError(f"{name} must be a number, got {value!r}. {remedy}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ParameterError(f"{name} must be a number, got {value!r}. {remedy}") from None
    if math.isnan(number):
        raise ParameterError(f"{name} must be a number, got NaN. {remedy}")
    return number


def whole(name: str, value: object, *, remedy: str) -> int:
    """`value` as a non-negative int; takes numpy integers, refuses booleans and floats such as 3.0."""
    if _is_boolean(value):
        raise ParameterError(f"{name} must be a whole number, got {value!r}. {remedy}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ParameterError(f"{name} must be an int, got {value!r}. {remedy}") from None
    if number < 0:
        raise ParameterError(f"{name} must be >= 0, got {number}. {remedy}")
    return number


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
    number = real(name, value, remedy=remedy)
    if number < 0 or math.isinf(number):
        raise ParameterError(f"{name} must be >= 0 and finite, got {number!r}. {remedy}")
    return number


def sample_rate(value: object) -> float:
    """A probability: that any one example is in a batch."""
    remedy = "Give expected batch size / number of examples, for example 256 / 60_000."
    number = real("sample_rate", value, remedy=remedy)
    if not 0 <= number <= 1:
        raise ParameterError(f"sample_rate must be in [0, 1], got {number!r}. {remedy}")
    return number


def steps(value: object, name: str = "steps") -> int:
    """A number of noisy steps."""
    return whole(name, value, remedy="Count the noisy steps taken, for example epochs * ceil(n / batch_size).")


def delta(value: object) -> float:
    """A delta strictly between 0 and 1."""
    remedy = "Choose it well below 1 / (number of examples), for example 1e-6."
    number = real("delta", value, remedy=remedy)
    if not 0 < number < 1:
        raise ParameterError(f"delta must be in (0, 1), both ends excluded, got {number!r}. {remedy}")
    return number


def epsilon(value: object) -> float:
    """A finite epsilon >= 0."""
    remedy = "Give a privacy budget such as 3.0."
    number = real("epsilon", value, remedy=remedy)
    if not 0 <= number < math.inf:
        raise ParameterError(f"epsilon must be >= 0 and finite, got {number!r}. {remedy}")
    return number
