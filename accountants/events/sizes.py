"""Checks of batch, bin and data set sizes, shared by the events that have them."""

from __future__ import annotations

from accountants import arguments
from accountants.errors import ParameterError


def at_least_one(name: str, value: object, *, remedy: str) -> int:
    """`value` as an int >= 1."""
    number = arguments.whole(name, value, remedy=remedy)
    if number < 1:
        raise ParameterError(f"{name} must be >= 1, got {number}. {remedy}")
    return number


def batch_within(batch_size: int, dataset_size: int) -> None:
    """Refuse a batch that has more examples than there are."""
    if batch_size > dataset_size:
        raise ParameterError(
            f"batch_size must be at most dataset_size, got {batch_size} > {dataset_size}. "
            "A batch without replacement holds each example at most once."
        )
