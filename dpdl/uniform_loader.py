"""What an ordinary `DataLoader` says about its data, and which ones can be sampled privately."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from dpdl.errors import LoaderError

__all__ = ["uniform_loader_sizes"]


def uniform_loader_sizes(loader: DataLoader[Any]) -> tuple[int, int, int]:
    """Dataset size, batch size and batches in one pass of a loader that treats all examples alike.

    Raises:
        LoaderError: the loader streams, weights or repeats examples, or has a batch sampler of its own;
            the plan's accounting would not describe such batches.
    """
    if not isinstance(loader, DataLoader):
        raise LoaderError(
            f"The loader must be a torch.utils.data.DataLoader, got {type(loader).__name__}. "
            "Put the dataset in one: DataLoader(dataset, batch_size=...)."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise LoaderError(
            f"The loader's dataset {type(loader.dataset).__name__} is an IterableDataset: examples that "
            "arrive in a stream cannot be drawn independently. Use a dataset with __len__ and "
            "__getitem__ (a list of file names and a lazy __getitem__ will do)."
        )
    if not isinstance(loader.dataset, Sized) or len(loader.dataset) == 0:
        raise LoaderError(
            f"The loader's dataset {type(loader.dataset).__name__} is empty or has no length. "
            "Use a dataset with __len__ and at least one example."
        )
    sampler = loader.sampler
    all_once = type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement)
    plain = all_once and isinstance(sampler, Sized) and len(sampler) == len(loader.dataset)
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler or not plain:
        raise LoaderError(
            f"The loader draws its batches with {type(sampler).__name__} in "
            f"{type(loader.batch_sampler).__name__}, but the plan's accounting holds for examples that are "
            "drawn independently with one probability. Give DataLoader(dataset, batch_size=..., "
            "shuffle=True); make_private replaces its sampler by Poisson sampling. To weight classes, "
            "weight the loss; to use a part of the data, torch.utils.data.Subset."
        )
    steps = len(loader)
    if steps == 0:
        raise LoaderError(
            f"The loader gives no batch: {len(loader.dataset)} examples, batch_size {loader.batch_size}, "
            f"drop_last={loader.drop_last}. Use a batch_size of at most {len(loader.dataset)}."
        )
    return len(loader.dataset), loader.batch_size, steps
