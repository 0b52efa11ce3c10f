"""`BatchMemoryManager`: logical batches in parts that fit into memory."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader

from dpdl.compat.opacus.data_loader import FixedDataLoader, PrivateBatches
from dpdl.compat.opacus.optimizers.optimizer import DPOptimizer
from dpdl.errors import ParameterError

__all__ = ["BatchMemoryManager", "wrap_data_loader"]


class _Parts(PrivateBatches):
    """A loader over parts of another's batches, which tells the optimizer where a batch ends."""

    def __init__(self, whole: PrivateBatches, *, limit: int, optimizer: DPOptimizer, expected: float) -> None:
        self._whole = whole
        self._limit = limit
        self._optimizer = optimizer
        self._expected = expected
        super().__init__(whole.dataset, batch_sampler=whole.batch_sampler, collate_fn=whole.collate_fn)

    def __len__(self) -> int:
        """About how many parts there are: batches are of random size."""
        return math.ceil(len(self._whole) * self._expected / self._limit - 1e-9)

    def __iter__(self) -> Any:
        def tell(last: bool) -> None:
            self._optimizer._step_skip_queue.clear()  # of a part that was not stepped on
            self._optimizer.signal_skip_step(do_skip=not last)

        self._optimizer.drop_partial()
        return self._whole.in_parts(self._limit, tell)


def wrap_data_loader(*, data_loader: DataLoader[Any], max_batch_size: int, optimizer: DPOptimizer) -> DataLoader[Any]:
    """A loader over parts of at most `max_batch_size` examples, on each of which `optimizer.step()` is to be called.

    Args:
        data_loader: a private loader.
        max_batch_size: the most examples of a part.
        optimizer: the private optimizer, which is told where a batch ends.

    Raises:
        ParameterError: the size is not positive, or the optimizer is not private.
    """
    if not isinstance(optimizer, DPOptimizer):
        raise ParameterError(f"optimizer must be the one that make_private returned, got {type(optimizer).__name__}.")
    if not max_batch_size > 0:
        raise ParameterError(f"max_physical_batch_size must be > 0, got {max_batch_size}.")
    whole = data_loader if isinstance(data_loader, PrivateBatches) else FixedDataLoader(data_loader)
    expected = getattr(whole.batch_sampler, "batch_size", None)
    if expected is None:
        sampled: Any = whole
        expected = sampled.sample_rate * len(sampled.dataset)
    return _Parts(whole, limit=max_batch_size, optimizer=optimizer, expected=expected)


class BatchMemoryManager:
    """Inside of the `with`, large batches come in parts; the weights move with the last part of each.

    A logical batch that is left half done is dropped: the next pass starts afresh.

    Args:
        data_loader: what make_private returned.
        max_physical_batch_size: the most examples in a part.
        optimizer: what make_private returned.
    """

    def __init__(self, *, data_loader: DataLoader[Any], max_physical_batch_size: int, optimizer: DPOptimizer) -> None:
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.max_physical_batch_size = max_physical_batch_size

    def __enter__(self) -> DataLoader[Any]:
        return wrap_data_loader(
            data_loader=self.data_loader, max_batch_size=self.max_physical_batch_size, optimizer=self.optimizer
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.optimizer._step_skip_queue.clear()
