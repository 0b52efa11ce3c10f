"""Partitions: exact, the same for the same seed, honest about the minimum, and of the skew that they promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpdl.errors import ParameterError
from dpdl.federated.partition import by_owner, dirichlet, iid, shards

LABELS = np.arange(4000) % 10

PARTITIONERS: dict[str, Callable[..., list[Any]]] = {
    "iid": lambda labels, clients, **more: iid(len(labels), clients, **more),
    "uneven": lambda labels, clients, **more: iid(
        len(labels), clients, proportions=[k + 1 for k in range(clients)], **more
    ),
    "dirichlet": lambda labels, clients, **more: dirichlet(labels, clients, alpha=1.0, **more),
    "shards": lambda labels, clients, **more: shards(labels, clients, **more),
}


def is_exact(parts: list[Any], size: int) -> bool:
    return sorted(int(i) for part in parts for i in part) == list(range(size))


@pytest.mark.parametrize("name", PARTITIONERS)
@given(
    labels=st.lists(st.integers(0, 5), min_size=60, max_size=200),
    clients=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=30, deadline=None)
def test_every_example_is_in_exactly_one_part_and_parts_ascend(
    name: str, labels: list[int], clients: int, seed: int
) -> None:
    parts = PARTITIONERS[name](labels, clients, seed=seed)
    assert len(parts) == clients
    assert is_exact(parts, len(labels))
    assert all(np.all(np.diff(part) > 0) for part in parts)
    assert all(part.dtype == np.int64 for part in parts)


@pytest.mark.parametrize("name", PARTITIONERS)
def test_the_seed_decides(name: str) -> None:
    first, again, other = (PARTITIONERS[name](LABELS, 7, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_global_generators_are_neither_used_nor_moved() -> None:
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    state = torch.get_rng_state()
    for partition in PARTITIONERS.values():
        partition(LABELS, 5)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_parts_differ_by_one_at_most_and_are_random() -> None:
    parts = iid(4003, 10)
    assert {len(part) for part in parts} == {400, 401}
    # 400 of 4,000 at random: the mean index has standard deviation 4,000 / sqrt(12 * 400) = 58.
    assert all(abs(part.mean() - 2001) < 6 * 58 for part in parts)
    shares = [np.bincount(LABELS[part[part < 4000]], minlength=10) for part in parts]
    assert np.ptp(shares) > 5  # not every client the same count of each label, as a stride would give
    assert np.max(shares) < 100


@pytest.mark.parametrize("size", [30, 300, 4000])
def test_proportions_are_kept_to_one_example(size: int) -> None:
    wanted = np.array([0.1, 0.2, 0.3, 0.4])
    sizes = [len(part) for part in iid(size, 4, proportions=list(wanted * 7))]
    assert np.all(np.abs(np.array(sizes) - wanted * size) <= 1)
    assert [len(part) for part in iid(100, 2, proportions=[3, 1])] == [75, 25]


def skew(parts: list[Any], labels: Any = LABELS) -> float:
    """Mean over clients of the total variation between its labels and everybody's: 0 even, 0.9 one label of ten."""
    overall = np.bincount(labels, minlength=10) / len(labels)
    own = [np.bincount(labels[part], minlength=10) / len(part) for part in parts]
    return float(np.mean([np.abs(p - overall).sum() / 2 for p in own]))


def test_dirichlet_grows_less_even_as_alpha_falls() -> None:
    harsh, uneven, even = (
        np.mean([skew(dirichlet(LABELS, 5, alpha=alpha, seed=seed)) for seed in range(10)]) for alpha in (0.1, 1, 1000)
    )
    assert harsh > 0.45
    assert 0.15 < uneven < 0.4
    assert even < 0.03


def test_dirichlet_has_the_spread_of_its_distribution_and_of_no_other() -> None:
    """Each share p of a label is Beta(alpha, alpha (K - 1)): variance (1/K)(1 - 1/K) / (alpha K + 1)."""
    clients, alpha = 4, 0.7
    shares = []
    for seed in range(120):
        parts = dirichlet(LABELS, clients, alpha=alpha, seed=seed)
        shares += [np.bincount(LABELS[part], minlength=10) / 400 for part in parts]
    measured = np.var(np.concatenate(shares) - 1 / clients)

    def expected(a: float) -> float:
        return (1 / clients) * (1 - 1 / clients) / (a * clients + 1)

    assert measured == pytest.approx(expected(alpha), rel=0.06)
    for wrong in (alpha * 1.25, alpha / 1.25, alpha * clients, alpha / clients):
        assert measured != pytest.approx(expected(wrong), rel=0.06)


def test_dirichlet_draws_again_until_everybody_has_the_minimum() -> None:
    free = [min(map(len, dirichlet(LABELS, 10, alpha=0.2, seed=seed))) for seed in range(20)]
    held = [min(map(len, dirichlet(LABELS, 10, alpha=0.2, minimum=60, seed=seed))) for seed in range(20)]
    assert min(free) < 60 <= min(held)


def test_shards_leave_most_clients_two_labels() -> None:
    parts = shards(LABELS, 20, per_client=2)  # 40 shards of 100, four of each label: none straddles two
    labels = [len(set(LABELS[part])) for part in parts]
    assert max(labels) <= 2
    assert labels.count(2) > 10
    assert {len(part) for part in parts} == {200}
    assert max(len(set(LABELS[part])) for part in shards(LABELS, 5, per_client=4)) > 2


@pytest.mark.parametrize(
    "owners", [[7, 3, 7, 7, 3, 9], ["g", "c", "g", "g", "c", "i"], torch.tensor([7, 3, 7, 7, 3, 9])]
)
def test_owners_keep_their_examples_in_the_order_of_their_names(owners: Any) -> None:
    assert [part.tolist() for part in by_owner(owners)] == [[1, 4], [0, 2, 3], [5]]


def test_labels_may_be_a_tensor_or_a_list() -> None:
    tensor = dirichlet(torch.from_numpy(LABELS), 5, alpha=1)
    listed = dirichlet(LABELS.tolist(), 5, alpha=1)
    assert all(np.array_equal(a, b) for a, b in zip(tensor, listed, strict=True))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: iid(10, 11), ["11 clients", "10"]),
        (lambda: iid(0, 1), ["size", "0"]),
        (lambda: iid(10, 0), ["clients", "0"]),
        (lambda: iid(10, 2, minimum=6), ["minimum=6", "12"]),
        (lambda: iid(10, 2, minimum=0), ["minimum", "0"]),
        (lambda: iid(10, 2, proportions=[1]), ["proportions", "2"]),
        (lambda: iid(10, 2, proportions=[1, -1]), ["proportions", "-1"]),
        (lambda: iid(10, 2, proportions=[1, float("inf")]), ["proportions", "inf"]),
        (lambda: iid(10, 2, proportions=[1, 99]), ["client 0", "minimum=1"]),
        (lambda: iid(10, 2, seed=-1), ["seed", "-1"]),
        (lambda: dirichlet(LABELS, 5, alpha=0), ["alpha", "shards"]),
        (lambda: dirichlet(LABELS, 5, alpha=float("nan")), ["alpha", "NaN"]),
        (lambda: dirichlet(LABELS, 5, alpha=float("inf")), ["alpha", "inf"]),
        (lambda: dirichlet(LABELS[:50], 10, alpha=0.01, minimum=5), ["1000 draws", "alpha=0.01", "minimum=5"]),
        (lambda: dirichlet(np.zeros((3, 2), int), 2, alpha=1), ["labels", "[3, 2]"]),
        (lambda: dirichlet([], 2, alpha=1), ["labels", "[0]"]),
        (lambda: dirichlet([0.5, 1.5], 2, alpha=1), ["labels", "float64"]),
        (lambda: shards(LABELS[:10], 4, per_client=3), ["12 shards", "10 examples"]),
        (lambda: shards(LABELS[:10], 2, per_client=0), ["per_client", "0"]),
        (lambda: shards(LABELS[:9], 2, per_client=1, minimum=5), ["need 10", "9"]),
        (lambda: by_owner(["a", "b", "b"], minimum=2), ["a has 1", "minimum=2"]),
        (lambda: by_owner([]), ["owners"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_value(call: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(ParameterError) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
