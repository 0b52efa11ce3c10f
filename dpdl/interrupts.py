"""Ctrl-C between steps: what is under way is finished, what there is is reported."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["held_interrupts"]


@contextmanager
def held_interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C (and SIGTERM) instead of dying in the middle of a step; the second one is not held."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
