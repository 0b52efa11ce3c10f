"""Batches of fixed size: their law, and who may claim a draw."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from dpdl.compat.deepee import UniformDataLoader
from dpdl.compat.deepee.dataloader import UniformWORSubsampler, draw_subset
from dpdl.errors import LoaderError, ParameterError
from dpdl.secure_random import RandomStream
from tests.compat.deepee.training import dataset

DRAWS = 4_000


def chi_square_refuses(counts: list[int]) -> bool:
    expected = sum(counts) / len(counts)
    statistic = sum((count - expected) ** 2 / expected for count in counts)
    return bool(chi2.sf(statistic, len(counts) - 1) < 1e-6)


@pytest.mark.parametrize(("size", "count"), [(6, 2), (6, 4), (5, 3), (6, 6), (6, 1), (1, 1)])
def test_every_subset_is_as_likely(size: int, count: int) -> None:
    stream = RandomStream.from_insecure_seed(3)
    seen = dict.fromkeys(itertools.combinations(range(size), count), 0)
    for message in range(DRAWS):
        seen[tuple(draw_subset(size, count, stream=stream, message=message).tolist())] += 1
    counts = list(seen.values())
    assert len(counts) == 1 or not chi_square_refuses(counts)


def test_the_test_of_the_law_would_notice_a_wrong_one() -> None:
    """Neighbours drawn together, as a permuted list cut up anew each time would not."""
    rng = np.random.default_rng(1)
    seen = dict.fromkeys(itertools.combinations(range(6), 2), 0)
    for _ in range(DRAWS):
        start = int(rng.integers(5)) if rng.random() < 0.2 else -1
        pair = (start, start + 1) if start >= 0 else tuple(sorted(rng.choice(6, 2, replace=False).tolist()))
        seen[pair] += 1  # type: ignore[index]
    assert chi_square_refuses(list(seen.values()))


def test_draws_are_independent_of_those_before() -> None:
    """How many of one draw's examples come again in the next: hypergeometric, not none as in an epoch's partition."""
    sampler = UniformWORSubsampler(dataset(20), 5)
    draws = list(itertools.chain.from_iterable(sampler for _ in range(250)))
    overlaps = [len(np.intersect1d(a, b)) for a, b in itertools.pairwise(draws)]
    mean, variance = 5 * 5 / 20, 5 * (5 / 20) * (15 / 20) * (15 / 19)
    assert abs(np.mean(overlaps) - mean) < 5 * (variance / len(overlaps)) ** 0.5
    assert len(draws) == 250 * 4


def test_a_large_data_set_costs_the_batch_only() -> None:
    drawn = draw_subset(10**12, 1000, stream=RandomStream.from_insecure_seed(1), message=0)
    assert len(np.unique(drawn)) == 1000
    assert drawn.min() >= 0
    assert drawn.max() < 10**12


def test_two_loaders_draw_differently_whatever_numpy_is_seeded_with() -> None:
    firsts = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002  # the state that deepee draws from
        torch.manual_seed(0)
        firsts.append(next(iter(UniformWORSubsampler(dataset(1000), 20))).tolist())
    assert firsts[0] != firsts[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_yields_whole_batches(workers: int) -> None:
    loader = UniformDataLoader(dataset(30), 8, num_workers=workers)
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    assert all(x.shape[0] == 8 and y.shape == (8,) for x, y in batches)
    assert isinstance(loader.batch_sampler, UniformWORSubsampler)


def test_a_draw_can_be_used_once_by_its_size_and_within_its_pass() -> None:
    sampler = UniformWORSubsampler(dataset(30), 8)
    assert not sampler.use_draw(8)
    draws = iter(sampler)
    next(draws)
    assert not sampler.use_draw(7)
    assert sampler.use_draw(8)
    assert not sampler.use_draw(8)
    next(draws)
    next(iter(sampler))  # a new pass; what the old one left over is gone
    assert sampler.use_draw(8)
    assert not sampler.use_draw(8)


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(LoaderError, match="different examples"):
        next(iter(UniformDataLoader(dataset(3), 4)))
    for size in (0, -1, 1.5, True):
        with pytest.raises(ParameterError, match="batch_size"):
            UniformDataLoader(dataset(3), size)  # type: ignore[arg-type]

    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(())

    with pytest.raises(LoaderError, match="no length"):
        UniformDataLoader(Stream(), 4)
