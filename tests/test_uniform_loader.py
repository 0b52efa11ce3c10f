"""Which ordinary loaders can be sampled privately, and what the others are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import dpdl
from dpdl.errors import LoaderError
from dpdl.uniform_loader import uniform_loader_sizes
from tests.small_run import FEATURES, N, examples, network, sgd, small_run, weights_of

DATA = TensorDataset(*examples())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(DATA)


class Unsized(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return DATA[index]


class EveryOther(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(0, N, 2))

    def __len__(self) -> int:
        return N // 2


class EveryOtherInOrder(SequentialSampler):
    """A subclass may yield anything."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, N, 2))

    def __len__(self) -> int:
        return N // 2


def weighted(loader_settings: dict[str, Any]) -> DataLoader[Any]:
    return DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * N, N), **loader_settings)


UNIFORM: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffled": lambda: DataLoader(DATA, batch_size=4, shuffle=True),
    "in order": lambda: DataLoader(DATA, batch_size=4),
    "random sampler": lambda: DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA)),
    "sequential sampler": lambda: DataLoader(DATA, batch_size=4, sampler=SequentialSampler(DATA)),
    "workers": lambda: DataLoader(DATA, batch_size=4, shuffle=True, num_workers=2),
}

NOT_UNIFORM: dict[str, tuple[Callable[[], DataLoader[Any]], str]] = {
    "weights": (lambda: weighted({"batch_size": 4}), "WeightedRandomSampler"),
    "replacement": (
        lambda: DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, replacement=True)),
        "RandomSampler",
    ),
    "fewer a pass": (
        lambda: DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, num_samples=6)),
        "RandomSampler",
    ),
    "subset": (
        lambda: DataLoader(DATA, batch_size=4, sampler=SubsetRandomSampler(range(6))),
        "SubsetRandomSampler",
    ),
    "own sampler": (lambda: DataLoader(DATA, batch_size=4, sampler=EveryOther()), "EveryOther"),
    "subclassed sampler": (
        lambda: DataLoader(DATA, batch_size=4, sampler=EveryOtherInOrder(DATA)),
        "EveryOtherInOrder",
    ),
    "sampler of other data": (
        lambda: DataLoader(DATA, batch_size=4, sampler=SequentialSampler(range(6))),
        "SequentialSampler",
    ),
    "batch sampler": (
        lambda: DataLoader(DATA, batch_sampler=EveryOtherBatch(SequentialSampler(DATA), 4, False)),
        "EveryOtherBatch",
    ),
    "no batches": (lambda: DataLoader(DATA, batch_size=None), "NoneType"),
    "stream": (lambda: DataLoader(Stream(), batch_size=4), "Stream"),
    "no length": (lambda: DataLoader(Unsized(), batch_size=4, sampler=EveryOther()), "Unsized"),
    "no examples": (lambda: DataLoader(TensorDataset(torch.zeros(0, FEATURES)), batch_size=4), "TensorDataset"),
    "no full batch": (lambda: DataLoader(DATA, batch_size=13, drop_last=True), "drop_last"),
}


class EveryOtherBatch(BatchSampler):
    pass


@pytest.mark.parametrize("name", UNIFORM)
def test_loaders_that_treat_examples_alike_are_taken(name: str) -> None:
    assert uniform_loader_sizes(UNIFORM[name]()) == (N, 4, 3)


def test_a_batch_sampler_of_the_plain_kind_is_what_the_loader_makes_itself() -> None:
    plain = DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, False))
    with pytest.raises(LoaderError, match=r"batch_size=\.\.\."):
        uniform_loader_sizes(plain)


@pytest.mark.parametrize("name", NOT_UNIFORM)
def test_other_loaders_are_refused_by_name_with_a_remedy(name: str) -> None:
    make, culprit = NOT_UNIFORM[name]
    with pytest.raises(LoaderError) as caught:
        uniform_loader_sizes(make())
    assert culprit in str(caught.value)
    assert any(word in str(caught.value) for word in ("Give DataLoader", "Use a dataset", "Use a batch_size"))


@pytest.mark.parametrize("name", NOT_UNIFORM)
def test_neither_a_plan_nor_a_run_is_made_of_them(name: str) -> None:
    make, _ = NOT_UNIFORM[name]
    with pytest.raises(LoaderError):
        dpdl.PrivacyPlan.for_loader(make(), epochs=1, noise_multiplier=1.0, max_grad_norm=1.0)
    model = network()
    before = weights_of(model)
    with pytest.raises(LoaderError):
        dpdl.make_private(model, sgd(model.parameters()), make(), small_run().optimizer.plan)
    assert all(torch.equal(before[key], value) for key, value in weights_of(model).items())
    small_run(model)  # nothing of it was claimed


def test_what_to_do_about_weights_streams_and_subsets_is_said() -> None:
    with pytest.raises(LoaderError, match="weight the loss"):
        uniform_loader_sizes(weighted({"batch_size": 4}))
    with pytest.raises(LoaderError, match=r"torch\.utils\.data\.Subset"):
        uniform_loader_sizes(NOT_UNIFORM["subset"][0]())
    with pytest.raises(LoaderError, match="__len__ and __getitem__"):
        uniform_loader_sizes(NOT_UNIFORM["stream"][0]())


def test_subsets_and_concatenations_are_datasets_like_others() -> None:
    assert uniform_loader_sizes(DataLoader(Subset(DATA, range(5)), batch_size=2)) == (5, 2, 3)
    assert uniform_loader_sizes(DataLoader(ConcatDataset([DATA, DATA]), batch_size=6)) == (24, 6, 4)


@pytest.mark.parametrize("thing", [[1, 2], DATA, None, iter([])])
def test_what_is_no_loader_is_refused(thing: Any) -> None:
    with pytest.raises(LoaderError, match=r"must be a torch\.utils\.data\.DataLoader.*DataLoader\(dataset"):
        uniform_loader_sizes(thing)


def test_a_plan_for_other_data_is_refused() -> None:
    plan = dpdl.PrivacyPlan.for_loader(
        DataLoader(DATA, batch_size=4), epochs=1, noise_multiplier=1.0, max_grad_norm=1.0
    )
    smaller = DataLoader(Subset(DATA, range(11)), batch_size=4)
    model = network()
    with pytest.raises(LoaderError, match=r"made for 12 examples.*has 11.*for_loader"):
        dpdl.make_private(model, sgd(model.parameters()), smaller, plan)


def test_a_plan_that_divides_by_another_batch_size_is_refused_even_without_its_dataset_size() -> None:
    plan = dpdl.PrivacyPlan(sample_rate=0.5, expected_batch_size=100, steps=3, noise_multiplier=1.0, max_grad_norm=1.0)
    model = network()
    with pytest.raises(LoaderError, match=r"expected_batch_size 100.*draws 6 of the loader's 12"):
        dpdl.make_private(model, sgd(model.parameters()), DataLoader(DATA, batch_size=6), plan)
