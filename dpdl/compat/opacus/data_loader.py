"""`DPDataLoader`: a loader over Poisson-sampled batches; empty ones are batches too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from dpdl.compat.opacus.empty_batches import CollateFnWithEmpty, wrap_collate_with_empty
from dpdl.compat.opacus.errors import NotOfferedError
from dpdl.compat.opacus.turn import Turn
from dpdl.compat.opacus.utils.uniform_sampler import UniformWithReplacementSampler
from dpdl.errors import LoaderError, ParameterError
from dpdl.sampling import PhysicalBatches
from dpdl.uniform_loader import uniform_loader_sizes

__all__ = [
    "CollateFnWithEmpty",
    "DPDataLoader",
    "FixedDataLoader",
    "PrivateBatches",
    "switch_generator",
    "wrap_collate_with_empty",
]


class PrivateBatches(DataLoader[Any]):
    """What the loaders of this facade share: they say which batch they hand out, and can hand it out in parts.

    Attributes:
        turn: told of each batch; None outside of a private run.
    """

    turn: Turn | None = None
    _begin_batch: Callable[[Any, int], Any]

    def in_parts(self, limit: int | None, tell: Callable[[bool], None] = lambda last: None) -> Iterator[Any]:
        """One pass over the batches, each in parts of at most `limit` examples.

        Args:
            limit: None for no limit.
            tell: told before each part whether it is its batch's last.
        """
        this_pass = 0 if self.turn is None else self.turn.begin_pass()
        batches_of_indices: Any = self.batch_sampler
        sampler: Any = _Drawn(iter(batches_of_indices))
        batches = PhysicalBatches(self, sampler, max_physical_batch_size=limit)
        for batch, size, last in batches.of_steps(range(len(self))):
            if self.turn is not None:
                self.turn.open(size=size, last=last, of_pass=this_pass)
                batch = self._begin_batch(batch, size)
            tell(last)
            yield batch

    def join(self, turn: Turn, *, begin_batch: Callable[[Any, int], Any]) -> None:
        """Become part of a private run.

        Args:
            turn: told of each batch.
            begin_batch: a batch and its size to what is handed out.
        """
        self.turn = turn
        self._begin_batch = begin_batch

    def __iter__(self) -> Any:
        return self.in_parts(None)


class DPDataLoader(PrivateBatches):
    """A loader whose batches each example joins by its own coin.

    Args:
        dataset: sized, with `__getitem__`.
        sample_rate: q in (0, 1].
        collate_fn, generator, kwargs: as in `DataLoader`.
        drop_last: taken for compatibility; there is no last, smaller batch.
        distributed: refused.
        batch_first: taken for compatibility: an empty batch is emptied along its first axis, or along its second.
        rand_on_empty: refused.
        steps: batches in a pass; None for 1 / sample_rate.
        secure: draw from the operating system whatever was seeded.

    Raises:
        NotOfferedError: `distributed` or `rand_on_empty`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        sample_rate: float,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        distributed: bool = False,
        batch_first: bool = True,
        rand_on_empty: bool = False,
        steps: int | None = None,
        secure: bool = False,
        **kwargs: Any,
    ) -> None:
        if distributed:
            raise NotOfferedError("This facade runs in one process. For several, use dpdl.make_private.")
        if rand_on_empty:
            raise NotOfferedError(
                "rand_on_empty=True would put a random example in place of an empty batch: one example more or less "
                "would then move the sum by twice max_grad_norm. Leave it out: empty batches work in every mode."
            )
        self.sample_rate = sample_rate
        sampler = UniformWithReplacementSampler(
            num_samples=len(dataset), sample_rate=sample_rate, generator=generator, steps=steps, secure=secure
        )
        super().__init__(dataset, batch_sampler=sampler, collate_fn=collate_fn, generator=generator, **kwargs)

    @classmethod
    def from_data_loader(
        cls,
        data_loader: DataLoader[Any],
        *,
        distributed: bool = False,
        generator: torch.Generator | None = None,
        batch_first: bool = True,
        rand_on_empty: bool = False,
        secure: bool = False,
    ) -> DPDataLoader:
        """A private loader over the same data, with each example's chance batch_size / n, as many batches a pass.

        Args:
            data_loader: an ordinary loader, with a batch size.
            distributed, generator, batch_first, rand_on_empty, secure: as in `DPDataLoader`.

        Raises:
            LoaderError: the loader streams, weights or repeats examples.
        """
        size, batch_size, steps = uniform_loader_sizes(data_loader)
        return cls(
            data_loader.dataset,
            sample_rate=min(batch_size, size) / size,
            generator=generator or (None if secure else data_loader.generator),
            distributed=distributed,
            batch_first=batch_first,
            rand_on_empty=rand_on_empty,
            steps=steps,
            secure=secure,
            **_settings(data_loader),
        )


class FixedDataLoader(PrivateBatches):
    """A loader with the batches of another, in its order: what `poisson_sampling=False` leaves.

    Args:
        data_loader: goes through each example at most once a pass.

    Raises:
        LoaderError: it streams, weights or repeats examples.
    """

    def __init__(self, data_loader: DataLoader[Any]) -> None:
        uniform_loader_sizes(data_loader)
        self.source = data_loader
        super().__init__(
            data_loader.dataset,
            batch_sampler=data_loader.batch_sampler,
            generator=data_loader.generator,
            **_settings(data_loader),
        )


def switch_generator(*, data_loader: DataLoader[Any], generator: torch.Generator | None) -> DataLoader[Any]:
    """The same shuffled loader as `data_loader`, drawing from `generator`.

    Raises:
        ParameterError: the loader does not shuffle.
        LoaderError: it has no collate function.
    """
    sampler = data_loader.sampler
    if not isinstance(sampler, RandomSampler) or not isinstance(data_loader.batch_sampler, BatchSampler):
        raise ParameterError(
            f"The loader draws with {type(sampler).__name__}, which takes no generator. Give DataLoader(shuffle=True)."
        )
    again = RandomSampler(sampler.data_source, replacement=sampler.replacement, generator=generator)
    batches = BatchSampler(again, data_loader.batch_sampler.batch_size, data_loader.batch_sampler.drop_last)
    return DataLoader(data_loader.dataset, batch_sampler=batches, generator=generator, **_settings(data_loader))


def _settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """How examples are loaded, apart from which."""
    if loader.collate_fn is None:
        raise LoaderError("The loader has no collate function. Give DataLoader(dataset, batch_size=...).")
    return {
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
    }


class _Drawn:
    """Batches of indices, one a step, for `PhysicalBatches`; which asks for them in order."""

    def __init__(self, batches: Iterator[list[int]]) -> None:
        self._batches = batches

    def draw(self, step: int) -> NDArray[np.int64]:
        """The next batch."""
        return np.asarray(next(self._batches), dtype=np.int64)
