"""The private loader behind ordinary pipelines: workers, transforms, collators; and which pipelines are refused."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)

import dpdl
from dpdl.errors import LoaderError
from tests.small_run import N, examples, network, same, small_run, train_on, weights_of

STEPS, BATCH = 6, 4
Row = dict[str, Any]


class Transformed(Dataset[Row]):
    """Map-style, decoded and transformed when asked for."""

    def __init__(self, transform: Callable[[Tensor], Tensor] = torch.sin, *, fails_at: int | None = None) -> None:
        self._x, self._y = examples(dtype=torch.float32)
        self._transform = transform
        self._fails_at = fails_at

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Row:
        assert isinstance(index, int)
        if index == self._fails_at:
            raise OSError("the file is gone")
        worker = get_worker_info()
        return {
            "x": self._transform(self._x[index]),
            "y": self._y[index],
            "worker": -1 if worker is None else worker.id,
        }


def pairs(rows: list[Row]) -> tuple[Tensor, Tensor]:
    return torch.stack([row["x"] for row in rows]), torch.stack([row["y"] for row in rows])


Batch = namedtuple("Batch", ["x", "y"])


@dataclass
class Columns:
    x: Tensor
    y: Tensor


def private(dataset: Dataset[Any], **loading: Any) -> dpdl.Private:
    loading = {"collate_fn": pairs, **loading}
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=BATCH, shuffle=True, **loading)
    return small_run(network(torch.float32), loader=loader, steps=STEPS, noise_multiplier=1.0)


def trained(run: dpdl.Private, take: Callable[[Any], Any] = lambda batch: batch) -> dict[str, Tensor]:
    while run.optimizer.steps_taken < STEPS:
        for batch in run.loader:
            train_on(run, take(batch))
    return weights_of(run.model)


@pytest.mark.parametrize(
    "loading",
    [
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True},
        {"num_workers": 1, "prefetch_factor": 4},
        {"pin_memory": True},
        pytest.param({"num_workers": 1, "multiprocessing_context": "spawn"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_how_batches_are_loaded_does_not_change_them(loading: dict[str, Any]) -> None:
    expected = trained(private(Transformed()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")  # where there is no accelerator
        assert same(trained(private(Transformed(), **loading)), expected)


def test_workers_load_the_examples() -> None:
    run = private(Transformed(), num_workers=2, collate_fn=None)
    workers = set()
    for batch in run.loader:
        workers |= set(batch["worker"].tolist())
        train_on(run, (batch["x"], batch["y"]))
    assert workers == {0, 1}


def test_workers_with_batches_in_parts() -> None:
    loader: DataLoader[Any] = DataLoader(Transformed(), batch_size=BATCH, collate_fn=pairs, num_workers=2)
    run = small_run(network(torch.float32), loader=loader, steps=STEPS, noise_multiplier=1.0, max_physical_batch_size=2)
    weights = trained(run)
    expected = trained(private(Transformed()))
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in expected.items())


@pytest.mark.parametrize(
    ("collate", "take"),
    [
        (lambda rows: dict(zip("xy", pairs(rows), strict=True)), lambda batch: (batch["x"], batch["y"])),
        (lambda rows: Batch(*pairs(rows)), lambda batch: (batch.x, batch.y)),
        (lambda rows: Columns(*pairs(rows)), lambda batch: (batch.x, batch.y)),
        (lambda rows: [*pairs(rows), [row["worker"] for row in rows]], lambda batch: (batch[0], batch[1])),
    ],
    ids=["dict", "named tuple", "dataclass", "list with names"],
)
def test_collators_of_one_s_own(collate: Any, take: Any) -> None:
    assert same(trained(private(Transformed(), collate_fn=collate), take), trained(private(Transformed())))


def test_a_random_transform_is_drawn_in_the_workers() -> None:
    """Augmentation: another view each time; the guarantee does not ask what a view is."""
    views: dict[int, list[Tensor]] = {i: [] for i in range(N)}
    x, _ = examples(dtype=torch.float32)
    run = private(Transformed(lambda row: row + 1e-3 * torch.rand(3)), num_workers=2)
    for batch in run.loader:
        for row in batch[0]:
            views[int((x - row).norm(dim=1).argmin())].append(row.detach().clone())
        train_on(run, batch)
    repeated = [rows for rows in views.values() if len(rows) > 1]
    assert repeated
    assert all(not torch.equal(rows[0], rows[1]) for rows in repeated)


class InBatches(Transformed):
    """Fetches many rows at once, and cannot fetch none."""

    def __getitems__(self, indices: list[int]) -> list[Row]:
        torch.stack([self._x[index] for index in indices])
        return [self[index] for index in indices]


def test_datasets_that_fetch_in_batches_are_never_asked_for_none() -> None:
    loader: DataLoader[Any] = DataLoader(InBatches(), batch_size=1, collate_fn=pairs)
    run = small_run(network(torch.float32), loader=loader, steps=30, noise_multiplier=1.0)
    sizes = []
    while run.optimizer.steps_taken < 30:
        for batch in run.loader:
            sizes.append(len(batch[0]))
            train_on(run, batch)
    assert 0 in sizes


def test_subsets() -> None:
    whole = TensorDataset(*examples(2 * N, dtype=torch.float32))
    run = private(Subset(whole, range(0, 2 * N, 2)), collate_fn=None)
    allowed = examples(2 * N, dtype=torch.float32)[0][::2]
    for x, y in run.loader:
        assert all(bool((allowed == row).all(1).any()) for row in x)
        train_on(run, (x, y))


def test_an_example_that_cannot_be_loaded_spends_nothing_and_ends_nothing() -> None:
    dataset = Transformed(fails_at=5)
    run = private(dataset, num_workers=1)
    with pytest.raises(OSError, match="the file is gone"):
        trained(run)
    taken = run.optimizer.steps_taken
    assert taken < STEPS
    dataset._fails_at = None
    assert same(trained(run), trained(private(Transformed())))


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(*examples(dtype=torch.float32), strict=True))


def refused(loader: DataLoader[Any], *words: str) -> None:
    plan = dpdl.PrivacyPlan(
        sample_rate=1 / 3, expected_batch_size=BATCH, steps=STEPS, noise_multiplier=1.0, max_grad_norm=1.0
    )
    model = network(torch.float32)
    with pytest.raises(LoaderError) as caught:
        dpdl.make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), loader, plan)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_stream_is_refused_with_what_to_do() -> None:
    refused(DataLoader(Stream(), batch_size=BATCH), "Stream is an IterableDataset", "__len__ and __getitem__")
    refused(DataLoader(Stream(), batch_size=BATCH, num_workers=2), "Stream is an IterableDataset")


def test_a_collator_of_what_cannot_be_empty_is_refused_before_training() -> None:
    run = private(Transformed(), collate_fn=lambda rows: object())
    with pytest.raises(LoaderError, match=r"empty batch.*Return tensors"):
        next(iter(run.loader))
    assert run.optimizer.ledger.releases == 0


def test_the_default_collator_does_what_torchs_does() -> None:
    run = private(Transformed(), collate_fn=None)
    batch = next(iter(run.loader))
    assert batch.keys() == default_collate([Transformed()[0]]).keys()
