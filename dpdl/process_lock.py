"""A lock between the threads of a process that a fork does not carry along.

A lock that another thread holds while a process forks is copied as held, and nobody in the child would ever let it go.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType

__all__ = ["ProcessLock"]


class ProcessLock:
    """For `with`; who has it may take it again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()

    def __enter__(self) -> None:
        """Wait for it."""
        if os.getpid() != self._process:
            self._lock, self._process = threading.RLock(), os.getpid()
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
