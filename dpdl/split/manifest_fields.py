"""What the fields of a manifest may hold: it comes from another party, and every claim depends on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dpdl.errors import ManifestError

__all__ = ["make_float", "numbers", "refuse_other_than", "refuse_other_than_texts"]


def make_float(terms: Any, *names: str) -> None:
    """So that 1 and 1.0 are the same text."""
    for name in names:
        value = getattr(terms, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ManifestError(f"{name} of the manifest must be a finite number, got {value!r}.")
        object.__setattr__(terms, name, float(value))


def numbers(name: str, given: object) -> dict[str, float]:
    """Names to numbers, sorted."""
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise ManifestError(f"{name} of the manifest must have a number by each name, got {given!r}.")
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ManifestError(f"{name} of the manifest must be numbers, got {value!r} for '{key}'.")
    return {key: float(value) for key, value in sorted(given.items())}


def refuse_other_than(terms: Any, name: str, known: tuple[str, ...]) -> None:
    """A text that is one of those known."""
    if getattr(terms, name) not in known:
        raise ManifestError(f"{name} of the manifest must be one of {list(known)}, got {getattr(terms, name)!r}.")


def refuse_other_than_texts(terms: Any, *names: str) -> None:
    """Texts, whatever they say."""
    for name in names:
        if not isinstance(getattr(terms, name), str):
            raise ManifestError(f"{name} of the manifest must be a text, got {getattr(terms, name)!r}.")
