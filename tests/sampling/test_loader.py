"""The private loader: Poisson batches of the right structure, the same with and without workers."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dpdl
from dpdl.errors import PlanExhaustedError, StepError
from tests.small_run import FEATURES, N, examples, network, sgd, small_run, train_on

X, Y = examples()


def at_rate(
    rate: float, loader: DataLoader[Any], *, steps: int = 20, seed: int | None = 51, **execution: Any
) -> dpdl.Private:
    """A run whose rate is free of the loader's batch size: 0 < rate << 1 draws empty batches only."""
    plan = dpdl.PrivacyPlan(
        sample_rate=rate,
        expected_batch_size=rate * len(loader.dataset),
        steps=steps,
        noise_multiplier=0.0,
        max_grad_norm=1.0,
    )
    model = network()
    return dpdl.make_private(
        model, sgd(model.parameters()), loader, plan, execution=dpdl.Execution(insecure_seed=seed, **execution)
    )


def numbered(n: int = N) -> TensorDataset:
    return TensorDataset(*examples(n), torch.arange(n))


def rows_of(private: dpdl.Private, steps: int | None = None) -> list[list[int]]:
    """The examples of each logical batch, over as many passes as it takes."""
    batches: list[list[int]] = []
    parts: list[int] = []
    steps = private.optimizer.plan.steps if steps is None else steps
    while len(batches) < steps:
        for x, y, rows in private.loader:
            taken = private.optimizer.steps_taken
            train_on(private, (x, y))
            parts += rows.tolist()
            if private.optimizer.steps_taken > taken:
                batches.append(parts)
                parts = []
            if len(batches) == steps:
                break
    return batches


# ── the draw ────────────────────────────────────────────────────────────────────────────────────────


def test_batch_sizes_are_binomial() -> None:
    """Chi-square over the sizes of 400 draws; a fixed size and rates off by a tenth are rejected."""
    n, batch_size, steps = 40, 10, 400
    private = small_run(dataset=numbered(n), batch_size=batch_size, steps=steps, engine="vmap")
    sizes = np.array([len(batch) for batch in rows_of(private)])

    def p_value(rate: float, observed: np.ndarray[Any, Any]) -> float:
        edges = [-1, 6, 8, 9, 10, 11, 12, 14, n]
        expected = np.diff(scipy.stats.binom.cdf(edges, n, rate)) * len(observed)
        counts = np.histogram(observed, bins=np.array(edges) + 0.5)[0]
        return float(scipy.stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(expected) - 1))

    assert p_value(batch_size / n, sizes) > 1e-3
    assert p_value(0.9 * batch_size / n, sizes) < 1e-3
    assert p_value(1.1 * batch_size / n, sizes) < 1e-3
    assert p_value(batch_size / n, np.full(steps, batch_size)) < 1e-3


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("physical", [None, 3])
def test_workers_give_the_same_batches(workers: int, physical: int | None) -> None:
    def run(num_workers: int) -> list[list[int]]:
        loader = DataLoader(numbered(), batch_size=4, shuffle=True, num_workers=num_workers)
        return rows_of(small_run(loader=loader, steps=6, max_physical_batch_size=physical))

    assert run(workers) == run(0)


@pytest.mark.parametrize("seed", [None, 1])
def test_two_passes_draw_different_batches(seed: int | None) -> None:
    batches = rows_of(small_run(dataset=numbered(200), batch_size=50, steps=8, insecure_seed=seed))
    assert len({tuple(batch) for batch in batches}) == 8


def test_secure_runs_draw_different_batches() -> None:
    first, second = (
        rows_of(small_run(dataset=numbered(200), batch_size=50, steps=2, insecure_seed=None)) for _ in range(2)
    )
    assert first != second


def test_the_original_loaders_order_and_seed_do_not_matter() -> None:
    def run(**settings: Any) -> list[list[int]]:
        return rows_of(small_run(loader=DataLoader(numbered(), batch_size=4, **settings), steps=3))

    generator = torch.Generator().manual_seed(1)
    assert run() == run(shuffle=True) == run(shuffle=True, generator=generator)


def test_rate_one_draws_everyone_at_every_step() -> None:
    assert rows_of(small_run(dataset=numbered(), steps=3)) == [list(range(N))] * 3


def test_a_batch_size_above_the_datasets_is_the_whole_dataset() -> None:
    private = small_run(dataset=numbered(), batch_size=100, steps=2)
    assert private.optimizer.plan.expected_batch_size == N
    assert rows_of(private) == [list(range(N))] * 2


# ── passes ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "length"), [(4, False, 3), (5, False, 3), (5, True, 2), (12, False, 1)]
)
@pytest.mark.parametrize("physical", [None, 2])
def test_a_pass_has_as_many_steps_as_an_epoch_had(
    batch_size: int, drop_last: bool, length: int, physical: int | None
) -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=batch_size, drop_last=drop_last)
    private = small_run(loader=loader, steps=20, max_physical_batch_size=physical)
    assert len(private.loader) == length == len(loader)
    for done in (1, 2):
        for batch in private.loader:
            train_on(private, batch)
        assert private.optimizer.steps_taken == done * length


def test_the_last_pass_ends_with_the_plan_and_the_next_one_is_refused() -> None:
    private = small_run(batch_size=4, steps=5)
    lengths = [sum(1 for _ in map(lambda b: train_on(private, b), private.loader)) for _ in range(2)]
    assert lengths == [3, 2]
    with pytest.raises(PlanExhaustedError, match="5 steps are taken"):
        iter(private.loader)


def test_a_plan_of_no_steps_gives_no_batch() -> None:
    with pytest.raises(PlanExhaustedError):
        iter(small_run(steps=0).loader)


def test_a_pass_after_a_broken_one_has_full_length_again() -> None:
    private = small_run(batch_size=4, steps=20)
    train_on(private, next(iter(private.loader)))
    for batch in private.loader:
        train_on(private, batch)
    assert private.optimizer.steps_taken == 1 + 3


def test_looking_at_a_batch_first_costs_nothing_and_does_not_change_the_draw() -> None:
    """`next(iter(loader))` to see shapes; looking again cannot be used to pick a draw one likes."""
    looked, plain = (small_run(dataset=numbered(), batch_size=4, steps=3) for _ in range(2))
    seen = [next(iter(looked.loader))[2].tolist() for _ in range(3)]
    assert seen[0] == seen[1] == seen[2]
    assert rows_of(looked) == rows_of(plain)


def test_collecting_all_batches_before_training_is_refused() -> None:
    with pytest.raises(StepError, match=r"not followed by optimizer\.step\(\)"):
        list(small_run(batch_size=4).loader)


def test_an_error_in_the_dataset_passes_through_and_a_new_pass_works() -> None:
    class Flaky(Dataset[Any]):
        broken = True

        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            if self.broken:
                raise OSError("disk full of bees")
            return X[index], Y[index]

    dataset = Flaky()
    private = small_run(dataset=dataset)
    with pytest.raises(OSError, match="bees"):
        next(iter(private.loader))
    dataset.broken = False
    train_on(private, next(iter(private.loader)))
    assert private.optimizer.steps_taken == 1


def test_settings_of_the_original_loader_are_kept() -> None:
    seen: list[list[int]] = []

    def collate(rows: list[Any]) -> Any:
        seen.append([int(row[2]) for row in rows])
        return torch.utils.data.default_collate(rows)

    loader = DataLoader(numbered(), batch_size=4, collate_fn=collate, pin_memory=False)
    batches = rows_of(small_run(loader=loader, steps=3))
    probe, *drawn = seen  # the first example was collated once, to see whether an empty batch can be made
    assert probe == [0]
    assert [batch for batch in drawn if batch != [0]] == [batch for batch in batches if batch not in ([], [0])]


# ── empty draws ─────────────────────────────────────────────────────────────────────────────────────


class Pair(NamedTuple):
    x: Tensor
    label: Tensor


class Rows(Dataset[Any]):
    """Twelve examples in the form that `make` gives them."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def empty_batch(dataset: Dataset[Any], **settings: Any) -> Any:
    private = at_rate(1e-12, DataLoader(dataset, batch_size=1, **settings))
    return next(iter(private.loader))


def test_an_empty_draw_of_pairs() -> None:
    x, y = empty_batch(TensorDataset(X, Y))
    assert (x.shape, x.dtype) == ((0, FEATURES), X.dtype)
    assert (y.shape, y.dtype) == ((0,), Y.dtype)


def test_an_empty_draw_of_nested_dicts_and_named_tuples_and_numbers() -> None:
    batch = empty_batch(Rows(lambda i: {"pair": Pair(X[i], Y[i]), "more": {"age": i, "weight": 0.5}}))
    assert type(batch["pair"]) is Pair
    assert batch["pair"].x.shape == (0, FEATURES)
    assert batch["more"]["age"].shape == batch["more"]["weight"].shape == (0,)


def test_an_empty_draw_of_images_from_numpy() -> None:
    x, y = empty_batch(Rows(lambda i: (np.ones((1, 5, 7), dtype=np.float32), np.int64(i))))
    assert (x.shape, x.dtype, y.shape) == ((0, 1, 5, 7), torch.float32, (0,))


def test_an_empty_draw_names_nobody() -> None:
    """Texts have no axis to empty: the list of them must be empty, not hold the first example's."""
    batch = empty_batch(Rows(lambda i: {"x": X[i], "name": f"patient {i}"}))
    assert len(batch["name"]) == 0


def test_an_empty_draw_through_a_custom_collate_function() -> None:
    def padded(rows: list[Any]) -> dict[str, Tensor]:
        return {"tokens": torch.nn.utils.rnn.pad_sequence([torch.arange(r + 1) for r in rows], batch_first=True)}

    batch = empty_batch(Rows(lambda i: i), collate_fn=padded)
    assert batch["tokens"].shape[0] == 0
    assert batch["tokens"].ndim == 2


def test_an_empty_draw_of_arrays_that_stay_arrays() -> None:
    batch = empty_batch(Rows(lambda i: X[i].numpy()), collate_fn=lambda rows: {"x": np.stack(rows)})
    assert len(batch["x"]) == 0


class Encoding(collections.UserDict[str, Tensor]):
    """As tokenizers return it: a mapping that is no dict."""


@dataclass
class Record:
    x: Tensor


@pytest.mark.parametrize("kind", [Encoding, Record])
def test_an_empty_draw_in_a_container_of_ones_own_is_empty_or_refused_before_the_first_step(kind: type) -> None:
    """Otherwise the run dies at the first empty draw, which may be hours in."""

    def collate(rows: list[Tensor]) -> Any:
        return kind(x=torch.stack(rows))

    loader = DataLoader(Rows(lambda i: X[i]), batch_size=1, collate_fn=collate)
    private = at_rate(1e-12, loader)
    batch = next(iter(private.loader))
    x = batch["x"] if kind is Encoding else batch.x
    assert len(x) == 0


def test_empty_draws_are_steps_and_train_on_through_them() -> None:
    private = at_rate(1e-12, DataLoader(TensorDataset(X, Y), batch_size=1), steps=3, max_physical_batch_size=2)
    for batch in private.loader:
        train_on(private, batch)
    assert private.optimizer.steps_taken == 3
    assert private.optimizer.diagnostics.examples == 0
