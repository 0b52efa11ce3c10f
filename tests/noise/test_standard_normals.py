"""The normals are standard normal, tails included, and fresh at every step and coordinate."""

import math

import numpy as np
import pytest
import torch
from mpmath import cos, log, mp, mpf, pi, sin, sqrt
from scipy.stats import binom, kstest
from torch import Tensor

from dpdl.errors import ParameterError
from dpdl.noise import MAX_NORMAL, standard_normals
from dpdl.noise.gaussian import _fill_normals
from dpdl.secure_random import RandomStream

COUNT = 1_000_000
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
    cosines, sines = normals.view(2, -1)
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


def fill(radius: list[int], angle: list[int]) -> Tensor:
    """The two normals of one pair from the radius and angle words of its two draws."""
    out = np.empty((2, 1))
    _fill_normals(out, np.array([radius, angle], dtype=np.uint64).view(np.int64).reshape(2, 2, 1))
    return torch.from_numpy(out).view(-1)


def test_the_largest_normal_is_the_stated_one() -> None:
    largest = 2 * math.sqrt(75 * math.log(2))
    assert pytest.approx(largest, rel=1e-15) == MAX_NORMAL
    assert fill([0, 0], [0, 0]).tolist() == pytest.approx([largest, 0.0], rel=1e-15)
    assert fill([2**63, 2**63], [0, 0])[0] == pytest.approx(largest, rel=1e-15)  # the top bit is unused


@pytest.mark.parametrize(
    ("radius_word", "angle_word"),
    [(0, 1), (0, 2047), (1, 0), (1, 5), (12345, 2**63 + 678), (2**60, 2**64 - 1), (2**62, 2**61 + 17)],
)
def test_a_draw_is_box_muller_of_74_and_53_bits(radius_word: int, angle_word: int) -> None:
    mp.prec = 200
    uniform = (mpf(radius_word * 2**11 + angle_word % 2**11) + mpf(1) / 2) / 2**74
    angle = 2 * pi * (angle_word // 2**11) / 2**53
    other = (mpf(2**62 * 2**11) + mpf(1) / 2) / 2**74  # second draw: U = 1/2, angle 0
    expected = [
        sqrt(-log(uniform)) * cos(angle) + sqrt(-log(other)),
        sqrt(-log(uniform)) * sin(angle),
    ]
    got = fill([radius_word, 2**62], [angle_word, 0])
    assert got.tolist() == pytest.approx([float(value) for value in expected], rel=1e-14, abs=1e-14)


def test_the_smallest_radii_are_off_by_less_than_2e_8() -> None:
    # U rounds to a double near 1, where the grain is 2^-53: the radius is within 2^-26.5 of the exact one.
    assert fill([2**63 - 1] * 2, [2047] * 2).abs().max() < 2e-8


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
    # Shifts by one, by half (the other value of a pair) and by the chunk's length.
    pairs = COUNT // 2
    for values in (normals, (normals**2 - 1) / math.sqrt(2)):
        for shift in (1, 2, 4, 1 << 16, 1 << 17, pairs):
            z = float(values @ values.roll(shift)) / math.sqrt(COUNT * (2 if shift == pairs else 1))
            assert abs(z) < 4.5, shift
    mixed = normals + 0.1 * normals.roll(1)
    assert abs(float(mixed @ mixed.roll(1))) / math.sqrt(COUNT) > 4.5


def test_no_value_comes_twice(normals: Tensor) -> None:
    assert normals.unique().numel() == COUNT  # by chance: 1e12 / 2^55


@pytest.mark.parametrize("count", [0, 1, 2, 3, (1 << 17) - 1, 1 << 17, (1 << 17) + 1, 400_001])
def test_any_count_gives_that_many_reproducible_normals(count: int) -> None:
    values = standard_normals(stream(), count, step=3)
    assert values.shape == (count,)
    assert values.isfinite().all()
    assert torch.equal(values, standard_normals(stream(), count, step=3))
    if count > 1000:
        assert is_standard_normal(values)


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
