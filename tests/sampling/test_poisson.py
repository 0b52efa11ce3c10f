"""Poisson sampling is n independent coins of rate q, and the tests would see a wrong rate or a fixed size."""

import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, chi2

import dpdl.sampling.poisson as poisson
from dpdl.errors import ParameterError
from dpdl.sampling.poisson import PoissonSampler
from dpdl.secure_random import RandomStream

N, Q, STEPS = 500, 0.1, 4000
P_VALUE = 1e-4  # of each test, on a fixed seed: it passes once and for all, or the sampler is wrong


def stream(seed: int = 0) -> RandomStream:
    return RandomStream.from_insecure_seed(seed)


def membership(n: int, q: float, steps: int, seed: int = 0) -> NDArray[np.bool_]:
    """Who was in which batch, [step, example]."""
    sampler = PoissonSampler(n, q, stream(seed))
    member = np.zeros((steps, n), dtype=bool)
    for step in range(steps):
        member[step, sampler.draw(step)] = True
    return member


def fixed_size(n: int, q: float, steps: int) -> NDArray[np.bool_]:
    generator = np.random.default_rng(0)
    member = np.zeros((steps, n), dtype=bool)
    for step in range(steps):
        member[step, generator.choice(n, round(q * n), replace=False)] = True
    return member


def rate_is(q: float, member: NDArray[np.bool_]) -> bool:
    """Whether the total count is likely under Binomial(size, q), exactly."""
    below = binom.cdf(member.sum(), member.size, q)
    return bool(P_VALUE < below < 1 - P_VALUE)


def examples_are_equal(q: float, member: NDArray[np.bool_]) -> bool:
    """Pearson's chi-square of how often each example was drawn."""
    steps, n = member.shape
    statistic = ((member.sum(0) - steps * q) ** 2).sum() / (steps * q * (1 - q))
    return bool(P_VALUE < chi2.cdf(statistic, n) < 1 - P_VALUE)


def sizes_are_binomial(q: float, member: NDArray[np.bool_]) -> bool:
    """Dispersion test of the batch sizes' variance, n q (1 - q)."""
    steps, n = member.shape
    statistic = ((member.sum(1) - n * q) ** 2).sum() / (n * q * (1 - q))
    return bool(P_VALUE < chi2.cdf(statistic, steps) < 1 - P_VALUE)


def largest_correlation(q: float, member: NDArray[np.bool_]) -> float:
    """Over all pairs of examples, in standard errors."""
    centred = (member - q) / math.sqrt(q * (1 - q))
    correlation = centred.T @ centred / math.sqrt(len(member))
    np.fill_diagonal(correlation, 0)
    return float(abs(correlation).max())


@pytest.fixture(scope="module")
def drawn() -> NDArray[np.bool_]:
    return membership(N, Q, STEPS)


def test_inclusion_rate_is_q_and_nine_tenths_or_eleven_tenths_are_rejected(drawn: NDArray[np.bool_]) -> None:
    assert rate_is(Q, drawn)
    assert not rate_is(Q, membership(N, 0.9 * Q, STEPS))
    assert not rate_is(Q, membership(N, 1.1 * Q, STEPS))


def test_every_example_is_as_likely_as_the_next(drawn: NDArray[np.bool_]) -> None:
    assert examples_are_equal(Q, drawn)
    uneven = np.hstack([membership(N // 2, rate, STEPS) for rate in (0.9 * Q, 1.1 * Q)])
    assert rate_is(Q, uneven)
    assert not examples_are_equal(Q, uneven)
    assert not examples_are_equal(Q, membership(N, 0.9 * Q, STEPS))
    assert not examples_are_equal(Q, membership(N, 1.1 * Q, STEPS))


def test_batch_sizes_vary_as_a_binomial_and_fixed_size_sampling_is_rejected(drawn: NDArray[np.bool_]) -> None:
    assert sizes_are_binomial(Q, drawn)
    assert rate_is(Q, fixed_size(N, Q, STEPS))
    assert not sizes_are_binomial(Q, fixed_size(N, Q, STEPS))
    assert not sizes_are_binomial(Q, membership(N, 0.9 * Q, STEPS))
    assert not sizes_are_binomial(Q, membership(N, 1.1 * Q, STEPS))


def test_examples_are_pairwise_independent(drawn: NDArray[np.bool_]) -> None:
    limit = 5.5  # standard errors: 125,000 pairs, two sides, 1 in 200
    assert largest_correlation(Q, drawn) < limit
    paired = drawn.copy()
    paired[: STEPS // 5, 1] = drawn[: STEPS // 5, 0]
    assert largest_correlation(Q, paired) > limit


def test_steps_are_independent_and_each_is_reproducible() -> None:
    sampler = PoissonSampler(10_000, 0.3, stream())
    batches = [set(sampler.draw(step)) for step in range(3)]
    for i, j in ((0, 1), (1, 2), (0, 2)):
        both = len(batches[i] & batches[j])
        assert abs(both - 900) < 5 * math.sqrt(900)
    assert set(sampler.draw(1)) == batches[1]
    assert set(PoissonSampler(10_000, 0.3, stream(1)).draw(1)) != batches[1]


def test_draw_is_ascending_and_in_range() -> None:
    indices = PoissonSampler(1000, 0.5, stream()).draw(0)
    assert indices.dtype == np.int64
    assert (np.diff(indices) > 0).all()
    assert indices[0] >= 0
    assert indices[-1] < 1000


@pytest.mark.parametrize("q", [0.0, 1.0, 2.0**-64, 2.0**-65, 5e-324, 1 - 2.0**-53, 0.1, 1 / 3, 512 / 60_000])
def test_threshold_is_q_rounded_down_to_64_bits(q: float) -> None:
    threshold = PoissonSampler(1, q, stream())._threshold
    assert Fraction(threshold, 2**64) <= Fraction(q) < Fraction(threshold + 1, 2**64)


class Given:
    """A stream that gives the words it was told to, or has the children it was told to have."""

    def __init__(self, words: NDArray[np.uint64] | None = None, **children: "Given") -> None:
        self.given = np.empty(0, np.uint64) if words is None else words
        self.child = children.__getitem__

    def words(self, count: int, *, message: int, start: int = 0) -> NDArray[np.uint64]:
        return self.given[start : start + count].copy()


@pytest.mark.parametrize("chunk", [4, 8, 1 << 22])
@pytest.mark.parametrize("q", [0.3, 2.0**-16, 3 * 2.0**-17, 2.0**-64, 1 - 2.0**-53, 0.0])
def test_digit_by_digit_is_the_comparison_of_64_bit_words(
    q: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poisson, "_CHUNK", chunk)
    threshold = int(Fraction(q) * 2**64)
    near = [threshold + d for d in (-(2**48), -(2**20), -1, 0, 1, 2**20, 2**48)]
    words = [min(max(word, 0), 2**64 - 1) for word in [*near, 0, 2**64 - 1, 2**63, *near]]
    words += [2**64 - 1] * (-len(words) % 4)
    high = np.array([word >> 48 for word in words], np.uint16)
    tied = [word for word in words if word >> 48 == threshold >> 48]
    low = np.array([(word % 2**48) << 16 | 0xFFFF for word in tied], np.uint64)
    stream = Given(high=Given(high.view(np.uint64)), low=Given(low))
    sampler = PoissonSampler(len(words), q, stream)  # type: ignore[arg-type]
    assert sampler.draw(0).tolist() == [i for i, word in enumerate(words) if word < threshold]


def test_chunks_do_not_change_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    # The threshold's upper digit is 0: all inclusions, about 3, are decided by the lower digits.
    n, q = 400_000, 2.0**-17
    whole = PoissonSampler(n, q, stream()).draw(5)
    monkeypatch.setattr(poisson, "_CHUNK", 1024)
    np.testing.assert_array_equal(PoissonSampler(n, q, stream()).draw(5), whole)
    assert len(whole) > 0


def test_rates_below_the_upper_digit_are_right_too() -> None:
    n, q, steps = 1_000_000, 2.0**-18, 100
    sampler = PoissonSampler(n, q, stream())
    total = sum(len(sampler.draw(step)) for step in range(steps))
    assert abs(total - n * q * steps) < 5 * math.sqrt(n * q * steps)


def test_rate_one_is_everybody_rate_zero_and_no_data_nobody() -> None:
    assert PoissonSampler(5, 1.0, stream()).draw(0).tolist() == [0, 1, 2, 3, 4]
    assert PoissonSampler(5, 0.0, stream()).draw(0).tolist() == []
    assert PoissonSampler(0, 0.5, stream()).draw(0).tolist() == []
    assert PoissonSampler(0, 1.0, stream()).draw(0).dtype == np.int64
    assert PoissonSampler(100_000, 1 - 2.0**-53, stream()).draw(0).size == 100_000


@pytest.mark.parametrize(("n", "q"), [(-1, 0.5), (5, -0.1), (5, 1.1), (5, math.nan), (5, math.inf)])
def test_sizes_and_rates_out_of_range_are_refused(n: int, q: float) -> None:
    with pytest.raises(ParameterError):
        PoissonSampler(n, q, stream())


def test_empty_batches_happen_as_often_as_they_should() -> None:
    sampler = PoissonSampler(10, 0.1, stream())
    empty = sum(sampler.draw(step).size == 0 for step in range(2000))
    assert abs(empty - 2000 * 0.9**10) < 5 * math.sqrt(2000 * 0.9**10)
