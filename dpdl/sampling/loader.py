"""The private loader: Poisson-sampled logical batches, in physical parts, from an ordinary loader's data."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from dpdl.errors import LoaderError
from dpdl.sampling.poisson import PoissonSampler
from dpdl.sampling.tensor_rows import by_rows

__all__ = ["PhysicalBatches"]

ALL = slice(None)


class PhysicalBatches:
    """Batches of a range of steps: what each step's draw selects, cut into parts, collated and loaded.

    Args:
        loader: where dataset, collate function, workers and memory pinning are taken from.
        sampler: draws the examples of a step.
        max_physical_batch_size: the most examples in a part; None for no limit.
        share: which of a step's examples are taken; the rest are other processes'.

    Guarantee:
        The parts of a step hold its draw's examples, each once, and nobody else's; of a step that drew nobody, none.

    Raises:
        LoaderError: an empty batch cannot be made of what the collate function returns.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        sampler: PoissonSampler,
        *,
        max_physical_batch_size: int | None,
        share: slice = ALL,
    ) -> None:
        self._loader = loader
        self._sampler = sampler
        self._limit = max_physical_batch_size
        self._share = share
        collate = loader.collate_fn or default_collate
        _emptied(collate([loader.dataset[0]]))  # an empty batch will come; if it cannot be made, better now

    def of_steps(self, steps: range) -> Iterator[tuple[Any, int, bool]]:
        """Batches of these steps in order, each with its size and whether it is the last part of its step.

        Raises:
            LoaderError: a step drew nobody, and what the loader gives cannot be emptied.
        """
        forms: deque[tuple[int, bool]] = deque()
        dataset, collate = by_rows(self._loader.dataset, self._loader.collate_fn)
        batches = DataLoader(
            dataset,
            batch_sampler=_Parts(self._sampler, steps, self._limit, self._share, forms),
            collate_fn=collate,
            num_workers=self._loader.num_workers,
            pin_memory=self._loader.pin_memory,
            timeout=self._loader.timeout,
            worker_init_fn=self._loader.worker_init_fn,
            multiprocessing_context=self._loader.multiprocessing_context,
            generator=self._loader.generator,
            prefetch_factor=self._loader.prefetch_factor,
        )
        for batch in batches:
            size, last = forms.popleft()
            yield (batch if size else _emptied(batch)), size, last


class _Parts:
    """A batch sampler: index lists, and on the side their forms. Runs ahead of the loader's workers."""

    def __init__(
        self,
        sampler: PoissonSampler,
        steps: range,
        limit: int | None,
        share: slice,
        forms: deque[tuple[int, bool]],
    ) -> None:
        self._sampler = sampler
        self._steps = steps
        self._limit = limit
        self._share = share
        self._forms = forms

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            drawn = self._sampler.draw(step)[self._share].tolist()
            limit = self._limit or max(1, len(drawn))
            starts = range(0, max(1, len(drawn)), limit)
            for start in starts:
                part = drawn[start : start + limit]
                self._forms.append((len(part), start == starts[-1]))
                yield part or [0]  # none: the first example, emptied once it is loaded


def _emptied(batch: Any) -> Any:
    """A batch of one example with that example taken out: nothing of it may be handed on.

    Raises:
        LoaderError: the batch holds something that cannot be emptied.
    """
    if isinstance(batch, (Tensor, np.ndarray)):
        return batch[:0] if batch.ndim else batch * 0
    if isinstance(batch, MutableMapping):
        emptied = copy.copy(batch)  # tokenizers and models return mappings of their own kind
        for key, value in batch.items():
            emptied[key] = _emptied(value)
        return emptied
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        values = {field.name: _emptied(getattr(batch, field.name)) for field in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **values)
    if isinstance(batch, (list, tuple)):
        if not any(isinstance(value, (Tensor, np.ndarray, MutableMapping, list, tuple)) for value in batch):
            return type(batch)()  # names and the like, one an example
        parts = [_emptied(value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if batch is None or type(batch) in (bool, int, float, str, bytes):
        return None if batch is None else type(batch)()
    raise LoaderError(
        f"The loader's collate function returns a {type(batch).__name__}, of which an empty batch cannot be made, "
        "and Poisson sampling draws empty batches. Return tensors in tuples, lists, dicts or dataclasses."
    )
