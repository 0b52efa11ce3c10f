"""What a fuzzer of the public API lets pass: an error of ours, or a right result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hypothesis import strategies as st

from dpdl.errors import PrivacyError

__all__ = ["Fuzzer", "ours"]

Fuzzer = Callable[[st.DataObject], None]


@contextmanager
def ours() -> Iterator[list[PrivacyError]]:
    """An error of ours is kept in the list; any other comes through."""
    caught: list[PrivacyError] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield caught
        except PrivacyError as error:
            caught.append(error)
        assert all(str(error) for error in caught), "an error without a word"
