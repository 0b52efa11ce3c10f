"""Batches of a fixed size, drawn uniformly without replacement, each draw independent of all others.

deepee draws with `numpy.random`, whose state can be computed from 624 outputs; here words come from AES. Which
examples a batch holds is private.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from accountants import arguments
from dpdl.errors import LoaderError
from dpdl.secure_random import RandomStream

__all__ = ["UniformDataLoader", "UniformWORSubsampler", "draw_subset"]


class UniformWORSubsampler(Sampler[Any]):
    """Index arrays of `batch_size` different examples, `len(dataset) // batch_size` of them in a pass.

    It counts its draws, so that a `PrivacyWatchdog` claims the amplification of a draw for one release and no more.

    Args:
        dataset: anything with a length.
        batch_size: B >= 1.

    Guarantee:
        Each draw is uniform over all subsets of B examples, and independent of the other draws.

    Raises:
        LoaderError: the data set has no length.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int) -> None:
        if not isinstance(dataset, Sized):
            raise LoaderError(
                f"The dataset {type(dataset).__name__} has no length, so batches cannot be drawn from all of it. "
                "Use a dataset with __len__ and __getitem__."
            )
        self.sample_size = len(dataset)
        self.batch_size = arguments.positive_whole("batch_size", batch_size, remedy="Count the examples of a batch.")
        self._stream = RandomStream.from_os()
        self._draws = 0
        self._unused = 0

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        """One pass.

        Raises:
            LoaderError: the dataset is smaller than a batch.
        """
        if self.batch_size > self.sample_size:
            raise LoaderError(
                f"A batch of {self.batch_size} different examples cannot be drawn from {self.sample_size}. Use a "
                f"batch_size of at most {self.sample_size}."
            )
        self._unused = 0
        for _ in range(len(self)):
            message, self._draws = self._draws, self._draws + 1
            self._unused += 1
            yield draw_subset(self.sample_size, self.batch_size, stream=self._stream, message=message)

    def __len__(self) -> int:
        return self.sample_size // self.batch_size

    def use_draw(self, size: int) -> bool:
        """Whether there is a draw of this pass, of `size` examples, that no release was made from yet; now it is used.

        With workers, draws run ahead of the batches that have arrived by what is prefetched.
        """
        if size != self.batch_size or not self._unused:
            return False
        self._unused -= 1
        return True


class UniformDataLoader(DataLoader[Any]):
    """A `DataLoader` over `UniformWORSubsampler`.

    Args:
        dataset: with a length.
        batch_size: B.
        num_workers: as in `DataLoader`.
        pin_memory: as in `DataLoader`; without an accelerator nothing is pinned.

    Guarantee:
        That of `UniformWORSubsampler`: each batch is uniform over all subsets of B examples, whatever was drawn before.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, num_workers: int = 0, pin_memory: bool = True) -> None:
        super().__init__(
            dataset,
            batch_sampler=UniformWORSubsampler(dataset, batch_size),
            num_workers=num_workers,
            pin_memory=pin_memory and torch.accelerator.is_available(),
        )


def draw_subset(size: int, count: int, *, stream: RandomStream, message: int) -> NDArray[np.int64]:
    """A uniform subset of `count` of the numbers 0, ..., size - 1, ascending.

    The first `count` different values of independent uniform numbers are such a subset, as every order of every subset
    is as likely as any other. Words that would favour some remainders are left out. Of more than half, the complement
    is drawn.

    Args:
        size: how many numbers there are.
        count: how many of them, at most size.
        stream: of randomness.
        message: its message, which serves nothing else.

    Returns:
        Shape [count], int64.
    """
    if 2 * count > size:
        kept = np.ones(size, dtype=bool)
        kept[draw_subset(size, size - count, stream=stream, message=message)] = False
        return np.flatnonzero(kept)
    last = np.uint64(2**64 // size * size - 1)
    found, words_used = np.empty(0, dtype=np.uint64), 0
    while len(found) < count:
        block = 2 * count + 16  # at most 1.4 count are expected to be needed
        words = stream.words(block, message=message, start=words_used)
        words_used += block
        values = np.concatenate([found, words[words <= last] % np.uint64(size)])
        found = values[np.sort(np.unique(values, return_index=True)[1])]
    return np.sort(found[:count]).astype(np.int64)
