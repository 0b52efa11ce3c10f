"""The private loader as frameworks count: one batch for each step, in however many parts it comes.

A framework that owns the loop asks for as many batches as the loader is long, and takes a step after each. With
`Execution(max_physical_batch_size=...)` a step takes a number of parts that only the draw tells. So the framework is
handed the first part of each step; who trains on it trains on the others, too, before the framework's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpdl.private import Private

__all__ = ["LogicalBatches"]


class LogicalBatches:
    """Iterates over the first part of each logical batch, if the others are taken in between.

    Args:
        private: what `make_private` returned.
    """

    def __init__(self, private: Private) -> None:
        self._private = private
        self._parts: Iterator[Any] = iter(())

    @property
    def dataset(self) -> Any:
        """The dataset that batches are drawn from."""
        return self._private.loader.dataset

    def __len__(self) -> int:
        """Steps in a pass."""
        return len(self._private.loader)

    def __iter__(self) -> Iterator[Any]:
        self._parts = iter(self._private.loader)
        return self._parts

    def other_parts(self) -> Iterator[Any]:
        """The parts after the current one, each after that one's step; the last one's step is left to the caller."""
        while not self._is_last():
            self._private.optimizer.step()  # ends a part; nothing is released yet
            yield next(self._parts)

    def _is_last(self) -> bool:
        return self._private.optimizer.completes_a_batch
