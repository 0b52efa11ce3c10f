"""Reading a batch of a `TensorDataset` at once gives what reading its examples gives, and only where it may."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from dpdl.sampling import PhysicalBatches, PoissonSampler, by_rows
from dpdl.secure_random import RandomStream

N = 23


class Reading(TensorDataset):
    """Counts the examples that are asked for; a subclass, whose examples are its own business."""

    asked = 0

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        self.asked += 1
        return tuple(2 * part for part in super().__getitem__(index))


def tensors() -> tuple[Tensor, ...]:
    images = torch.randn(N, 4, 3).transpose(1, 2)  # not contiguous
    return images, torch.arange(N), torch.randn(N, 2, dtype=torch.float64)


def batches(dataset: Any, collate: Any, seed: int = 3) -> Iterator[Any]:
    order = torch.Generator().manual_seed(seed)
    yield from DataLoader(dataset, batch_size=5, shuffle=True, generator=order, collate_fn=collate)


@pytest.mark.parametrize("collate", [None, default_collate])
def test_batches_are_those_of_reading_each_example(collate: Any) -> None:
    dataset = TensorDataset(*tensors())

    rows, as_it_is = by_rows(dataset, collate)

    assert rows is not dataset
    assert len(rows) == N
    for one, other in zip(batches(dataset, collate), batches(rows, as_it_is), strict=True):
        assert type(one) is type(other)
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
            assert a.stride() == b.stride()
    next(batches(rows, as_it_is))[0].zero_()
    assert dataset.tensors[0].abs().min() > 0, "a batch is a copy"


def test_a_subclass_and_another_collate_function_are_left_as_they_are() -> None:
    subclass, plain = Reading(*tensors()), TensorDataset(*tensors())

    def own(examples: list[Any]) -> Any:
        return default_collate(examples)

    assert by_rows(subclass, None) == (subclass, None)
    assert by_rows(plain, own) == (plain, own)
    next(batches(*by_rows(subclass, None)))
    assert subclass.asked == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_private_batches_are_the_drawn_rows(workers: int) -> None:
    dataset = TensorDataset(*tensors())
    sampler = PoissonSampler(N, 0.2, RandomStream.from_insecure_seed(1).child("sampling"))
    loader = DataLoader(dataset, batch_size=5, num_workers=workers)

    drawn = PhysicalBatches(loader, sampler, max_physical_batch_size=3).of_steps(range(40))

    sizes: list[int] = []
    parts: list[Tensor] = []
    step = 0
    for (images, numbers, _), size, last in drawn:
        assert len(images) == len(numbers) == size <= 3
        assert torch.equal(images, dataset.tensors[0][numbers])
        parts.append(numbers)
        if last:
            assert torch.cat(parts).tolist() == sampler.draw(step).tolist()
            sizes.append(sum(map(len, parts)))
            parts, step = [], step + 1
    assert step == 40
    assert 0 in sizes
    assert max(sizes) > 3
