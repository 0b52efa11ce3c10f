"""The normals are standard normal, tails included, and fresh at every step and coordinate."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import cos, log, mp, mpf, pi, sin, sqrt, tan
from numpy.typing import NDArray
from scipy.stats import binom, kstest
from torch import Tensor

from dpdl.errors import ParameterError
from dpdl.noise import MAX_NORMAL, standard_normals
from dpdl.noise.normals import UNIT, _fill_normals
from dpdl.secure_random import RandomStream

COUNT = 1_000_000
CHUNK = 1 << 16  # normals worked on at once: 2^15 cosines, then as many sines
P_VALUE = 1e-4  # of each test, on a fixed seed


def stream(seed: int = 0) -> RandomStream:
    return RandomStream.from_insecure_seed(seed)


@pytest.fixture(scope="module")
def normals() -> Tensor:
    return standard_normals(stream(), COUNT, step=0)


@pytest.fixture(scope="module")
def sixteen_million() -> Tensor:
    return standard_normals(stream(1), 16 * COUNT, step=0)


def is_standard_normal(values: Tensor) -> bool:
    return bool(kstest(values.numpy(), "norm").pvalue > P_VALUE)


def test_values_are_standard_normal_and_two_percent_off_is_rejected(normals: Tensor) -> None:
    assert normals.dtype == torch.float64
    assert is_standard_normal(normals)
    assert not is_standard_normal(0.98 * normals)
    assert not is_standard_normal(1.02 * normals)


def test_both_halves_of_the_pairs_are_standard_normal(normals: Tensor) -> None:
    whole_chunks = normals[: COUNT // CHUNK * CHUNK].view(-1, 2, CHUNK // 2)
    cosines, sines = whole_chunks.transpose(0, 1).reshape(2, -1)
    assert is_standard_normal(cosines)
    assert is_standard_normal(sines)
    assert not is_standard_normal(0.98 * cosines)
    assert not is_standard_normal(1.02 * sines)


def beyond_is_likely(values: Tensor, z: float, p_value: float = P_VALUE) -> bool:
    """Whether the number of values beyond +-z is likely, exactly binomial."""
    count = int((values.abs() > z).sum())
    below = binom.cdf(count, values.numel(), math.erfc(z / math.sqrt(2)))
    return bool(p_value < below < 1 - p_value)


@pytest.mark.parametrize("z", [3.0, 4.0])
def test_tails_beyond_3_and_4_are_right_and_a_wrong_scale_is_rejected(sixteen_million: Tensor, z: float) -> None:
    assert beyond_is_likely(sixteen_million, z)
    assert not beyond_is_likely(0.98 * sixteen_million, z)
    assert not beyond_is_likely(1.02 * sixteen_million, z)


def test_tail_beyond_5_is_right_and_a_wrong_scale_is_rejected(sixteen_million: Tensor) -> None:
    # 9.2 are expected, so that even none at all has probability 1e-4.
    assert beyond_is_likely(sixteen_million, 5.0, 1e-3)
    assert not beyond_is_likely(0.9 * sixteen_million, 5.0, 1e-3)
    assert not beyond_is_likely(1.1 * sixteen_million, 5.0, 1e-3)


def test_either_sign_is_as_likely_in_the_tail(sixteen_million: Tensor) -> None:
    above, below = int((sixteen_million > 4).sum()), int((sixteen_million < -4).sum())
    assert abs(above - below) < 4 * math.sqrt(above + below)


def fill(*, radius: int, angle: int, low: int = 0, blur: tuple[int, int] = (0, 0)) -> list[int]:
    """The two normals of one pair, in units, from its words."""
    halves = np.array([*blur, low, 0], dtype=np.int32).view(np.int64)
    words = np.concatenate([np.array([radius, angle], dtype=np.uint64).view(np.int64), halves])
    out = np.empty((2, 1))
    _fill_normals(out, words, np.empty((3, 1)))
    return [int(value) for value in out[:, 0]]


def test_the_largest_normal_is_the_stated_one() -> None:
    largest = math.sqrt(400 * math.log(2)) + 1 / 16
    assert pytest.approx(largest, rel=1e-15) == MAX_NORMAL
    assert MAX_NORMAL > 14
    top = fill(radius=0, angle=0, blur=(2**31 - 1, 0))
    assert [value * UNIT for value in top] == pytest.approx([largest, 0.0], abs=2 * UNIT)


@pytest.mark.parametrize(("radius", "low"), [(0, 0), (0, 1), (0, -(2**31)), (1, 0), (2**64 - 1, 5), (2**40, 77)])
@pytest.mark.parametrize("angle", [1, 12345, 2**63 + 678, 2**61 + 17])
def test_the_tail_is_resolved_beyond_fourteen(radius: int, low: int, angle: int) -> None:
    mp.prec = 300
    signed = (radius + 2**63) % 2**64 - 2**63
    theta = (angle + 2**63) % 2**64 - 2**63
    uniform = abs(signed + (low + mpf(theta) / 2**64) / 2**32) / mpf(2) ** 63
    expected = sqrt(-2 * log(uniform))
    got = math.hypot(*fill(radius=radius, angle=angle, low=low)) * UNIT
    assert got == pytest.approx(float(expected), abs=2 * UNIT)
    if (radius, low, angle) == (0, 0, 1):
        assert got > 14


@given(
    radius=st.integers(0, 2**64 - 1) | st.integers(0, 2**20),
    angle=st.integers(0, 2**64 - 1),
    low=st.integers(-(2**31), 2**31 - 1),
    blur=st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 2),
)
def test_a_pair_is_box_muller_rounded_to_the_grid_plus_its_blurs(
    radius: int, angle: int, low: int, blur: tuple[int, int]
) -> None:
    mp.prec = 300
    signed, theta = ((word + 2**63) % 2**64 - 2**63 for word in (radius, angle))
    uniform = abs(signed + (low + mpf(theta) / 2**64) / 2**32) / mpf(2) ** 63
    if uniform == 0 or 1 - uniform < mpf(2) ** -30:  # its own test
        return
    length = sqrt(-2 * log(uniform)) / UNIT
    double_angle = 2 * pi * theta / mpf(2) ** 64
    exact = [length * cos(double_angle), length * sin(double_angle)]
    for value, normal, v in zip(fill(radius=radius, angle=angle, low=low, blur=blur), exact, blur, strict=True):
        assert abs(value - v - normal) <= 0.5 + 2.0**-48 * length + 2.0**-10


def test_the_smallest_radii_are_off_by_less_than_2_to_the_minus_25() -> None:
    # u rounds to a double near 1, where the grain is 2^-53.
    for radius in (2**63 - 1, 2**63, 2**63 - 512, 2**63 - 3000):
        signed = (radius + 2**63) % 2**64 - 2**63
        exact = math.sqrt(2 * max(2**63 - abs(signed), 0) / 2**63)
        assert abs(math.hypot(*fill(radius=radius, angle=2**60)) * UNIT - exact) < 2**-25


def ulps_off(function: Callable[[np.ndarray], np.ndarray], oracle: Callable[[mpf], mpf], values: np.ndarray) -> float:
    """The largest error of numpy's vectorised function, in units in the last place of its results."""
    mp.prec = 120
    results = function(values)
    errors = [abs(mpf(float(r)) - oracle(mpf(float(v)))) for r, v in zip(results, values, strict=True)]
    return max(float(e) / float(np.spacing(abs(r))) for e, r in zip(errors, results, strict=True))


def test_logarithm_and_tangent_are_within_the_four_ulps_that_the_guarantee_assumes() -> None:
    generator = np.random.default_rng(0)
    uniform = generator.random(4000)
    assert ulps_off(np.log, log, np.concatenate([uniform**2, 2.0 ** (-300 * uniform), 1 - uniform * 2.0**-20])) < 4
    angles = (uniform - 0.5) * math.pi
    near = math.pi / 2 - uniform * 2.0**-20
    assert ulps_off(np.tan, tan, np.concatenate([angles, near, -near, uniform * 2.0**-20])) < 4
    assert ulps_off(lambda x: np.tan(x).astype(np.float32).astype(np.float64), tan, angles) > 4


def test_values_lie_on_the_grid(normals: Tensor) -> None:
    units = normals / UNIT
    assert torch.equal(units, units.round())
    assert len(units.remainder(1 << 20).unique()) > 600_000  # of 2^20 residues, 1 - 1/e of them


def test_the_blur_is_uniform_and_a_tenth_narrower_is_rejected() -> None:
    # Where u rounds to 1 there is nothing but blur.
    halves = stream(2).words(100_000, message=0).view(np.int32)
    words = np.concatenate([np.full(100_000, 2**63 - 1), np.zeros(100_000, np.int64), halves.view(np.int64)])
    words = np.concatenate([words, np.zeros(50_000, np.int64)])
    out = np.empty((2, 100_000))
    _fill_normals(out, words, np.empty((3, 100_000)))
    for blur in out * UNIT:
        assert kstest(blur, "uniform", args=(-1 / 16, 1 / 8)).pvalue > P_VALUE
        assert kstest(0.9 * blur, "uniform", args=(-1 / 16, 1 / 8)).pvalue < P_VALUE
        assert kstest(1.1 * blur, "uniform", args=(-1 / 16, 1 / 8)).pvalue < P_VALUE


def largest_correlation(rows: Tensor) -> float:
    """Over all pairs of rows, in standard errors."""
    correlation = rows @ rows.T / math.sqrt(rows.shape[1])
    return float(correlation.fill_diagonal_(0).abs().max())


def test_steps_and_streams_are_uncorrelated() -> None:
    rows = torch.stack([standard_normals(stream(seed), 20_000, step=step) for seed in range(4) for step in range(16)])
    limit = 5.0  # standard errors: 2,016 pairs, 1 in 800
    assert largest_correlation(rows) < limit
    rows[1] += 0.1 * rows[0]
    assert largest_correlation(rows) > limit


def test_coordinates_are_uncorrelated_in_value_and_in_size(normals: Tensor) -> None:
    # Shifts by one, by half a chunk (for half of the values, the other one of their pair) and by a chunk.
    for values in (normals, (normals**2 - 1) / math.sqrt(2)):
        for shift in (1, 2, 4, CHUNK // 2, CHUNK, 2 * CHUNK):
            z = float(values @ values.roll(shift)) / math.sqrt(COUNT)
            assert abs(z) < 4.5, shift
    mixed = normals + 0.1 * normals.roll(1)
    assert abs(float(mixed @ mixed.roll(1))) / math.sqrt(COUNT) > 4.5


def test_values_come_twice_only_by_chance(normals: Tensor) -> None:
    assert COUNT - normals.unique().numel() <= 15  # 4.1 are expected: COUNT^2 UNIT / (4 sqrt(pi))


@pytest.mark.parametrize("count", [0, 1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2, 400_001])
def test_any_count_gives_that_many_reproducible_normals(count: int) -> None:
    values = standard_normals(stream(), count, step=3)
    assert values.shape == (count,)
    assert values.isfinite().all()
    assert torch.equal(values, standard_normals(stream(), count, step=3))
    if count > 1000:
        assert is_standard_normal(values)


class Recorded(RandomStream):
    """Notes which words were asked for."""

    def words(self, count: int, *, message: int, start: int = 0) -> NDArray[np.uint64]:
        self.asked = [*getattr(self, "asked", []), (message, start, start + count)]
        return super().words(count, message=message, start=start)


@pytest.mark.parametrize("count", [1, 2, 3, CHUNK, 3 * CHUNK + 5])
def test_no_word_serves_two_chunks(count: int) -> None:
    recorded = Recorded(bytes(32), seed=0)
    standard_normals(recorded, count, step=9)
    ends = [0] + [end for _, _, end in recorded.asked]
    assert [(message, start) for message, start, _ in recorded.asked] == [(9, end) for end in ends[:-1]]
    pairs = (count + 1) // 2
    assert ends[-1] == -(-7 * pairs // 2)  # 3.5 words a pair


def test_values_do_not_depend_on_the_number_of_threads(normals: Tensor) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(standard_normals(stream(), COUNT, step=0), normals)
    finally:
        torch.set_num_threads(threads)


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ParameterError, match="count"):
        standard_normals(stream(), -1, step=0)
