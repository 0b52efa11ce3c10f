"""Each way of choosing chooses with the probabilities that are accounted, from randomness that nobody else uses."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare

from dpdl.errors import ParameterError
from dpdl.federated.client_sampling import ClientSampling, EveryClient, FixedSizeClients, PoissonClients
from dpdl.secure_random import RandomStream
from tests.federated.server.small_federation import names

ROUNDS = 4000
STREAM = RandomStream.from_insecure_seed(3)


def draws(sampling: ClientSampling, count: int, rounds: int = ROUNDS) -> list[tuple[str, ...]]:
    return [sampling.select(names(count), number, STREAM) for number in range(rounds)]


def uniform(counts: Counter[tuple[str, ...]], kinds: int) -> bool:
    observed = [*counts.values(), *[0] * (kinds - len(counts))]
    return bool(chisquare(observed).pvalue > 1e-4)


def test_poisson_coins_are_independent_and_of_the_planned_rate() -> None:
    drawn = draws(PoissonClients(0.3), 3)
    for wanted in itertools.product([False, True], repeat=3):
        probability = np.prod([0.3 if inside else 0.7 for inside in wanted])
        chosen = tuple(name for name, inside in zip(names(3), wanted, strict=True) if inside)
        seen = sum(draw == chosen for draw in drawn)
        assert 1e-5 < binom.cdf(seen, ROUNDS, probability) < 1 - 1e-5
    included = sum(map(len, drawn))
    for off in (0.9, 1.1):
        assert not 1e-4 < binom.cdf(included, 3 * ROUNDS, 0.3 * off) < 1 - 1e-4


def test_fixed_size_cohorts_are_uniform_over_all_of_that_size() -> None:
    drawn = Counter(draws(FixedSizeClients(2), 5))
    assert all(len(set(cohort)) == 2 for cohort in drawn)
    assert uniform(drawn, 10)
    favoured = Counter({cohort: int(count * (1.3 if "client-0" in cohort else 1)) for cohort, count in drawn.items()})
    assert not uniform(favoured, 10)


def test_everybody_is_everybody() -> None:
    assert EveryClient().select(["b", "a"], 0, STREAM) == ("a", "b")


@pytest.mark.parametrize("sampling", [PoissonClients(0.5), FixedSizeClients(3)])
def test_the_choice_depends_on_names_round_and_stream_and_on_nothing_else(sampling: ClientSampling) -> None:
    chosen = sampling.select(names(8), 1, STREAM)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert sampling.select(list(reversed(names(8))), 1, STREAM) == chosen
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert before == after
    others = {sampling.select(names(8), number, STREAM) for number in range(2, 20)}
    assert len(others) > 5
    assert len({sampling.select(names(8), 1, RandomStream.from_os()) for _ in range(20)}) > 5


@pytest.mark.parametrize(
    ("sampling", "listed", "says"),
    [
        (FixedSizeClients(3), ["a", "b"], "3 clients cannot be chosen among the 2"),
        (PoissonClients(0.5), ["a", "b", "a"], "two clients have the name 'a'"),
        (EveryClient(), ["a", ""], "non-empty"),
        (EveryClient(), "abc", "list of names"),
    ],
)
def test_who_cannot_be_chosen_is_refused(sampling: ClientSampling, listed: list[str], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        sampling.select(listed, 0, STREAM)


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, float("nan"), "0.5"])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ParameterError, match="rate"):
        PoissonClients(rate)


@pytest.mark.parametrize("size", [0, -1, 2.0])
def test_a_size_that_is_none_is_refused(size: int) -> None:
    with pytest.raises(ParameterError, match="size"):
        FixedSizeClients(size)
