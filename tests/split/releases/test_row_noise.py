"""Rows leave clipped, with noise of the right scale, fresh for each release; noise without clipping is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from dpdl.errors import ModelError, ParameterError
from dpdl.secure_random import RandomStream
from dpdl.split.cut_release import CutRelease
from dpdl.split.gradient_release import GradientRelease
from dpdl.split.row_noise import clip_rows, noised_rows

P_VALUE = 1e-4  # of each test, on a fixed seed
SHAPE = (4000, 5, 5)


def noise_of(rows: Tensor, *, max_norm: float, noise_multiplier: float, number: int = 0) -> Tensor:
    stream = RandomStream.from_insecure_seed(3)
    sent = noised_rows(rows, max_norm=max_norm, noise_multiplier=noise_multiplier, stream=stream, number=number)
    return sent - clip_rows(rows, max_norm=max_norm)


def is_normal(noise: Tensor, std: float) -> bool:
    values = noise.reshape(-1).numpy() / std
    spread = abs(float(values.std()) - 1) * math.sqrt(2 * values.size)  # in standard errors
    return bool(kstest(values, "norm").pvalue > P_VALUE and spread < 5)


@pytest.mark.parametrize(("max_norm", "noise_multiplier"), [(1.0, 0.5), (3.0, 2.0), (0.01, 16.0)])
def test_noise_has_the_std_of_multiplier_times_norm_and_two_percent_off_is_rejected(
    max_norm: float, noise_multiplier: float
) -> None:
    rows = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = noise_of(rows, max_norm=max_norm, noise_multiplier=noise_multiplier)
    std = noise_multiplier * max_norm
    assert is_normal(noise, std)
    assert not is_normal(noise, 0.98 * std)
    assert not is_normal(noise, 1.02 * std)
    assert not is_normal(noise, std / 2)  # the noise of a sensitivity that was halved


def test_each_row_and_each_coordinate_has_noise_of_its_own() -> None:
    noise = noise_of(torch.zeros(SHAPE, dtype=torch.float64), max_norm=1.0, noise_multiplier=1.0).reshape(4000, 25)
    between_rows, between_places = np.corrcoef(noise[:60].numpy()), np.corrcoef(noise.numpy(), rowvar=False)
    assert np.abs(between_places - np.eye(25)).max() < 6 / math.sqrt(4000)
    assert np.abs(between_rows - np.eye(60)).max() < 6 / math.sqrt(25)
    assert noise.unique().numel() == noise.numel()


def test_another_release_has_other_noise_and_the_same_number_the_same() -> None:
    rows = torch.zeros(SHAPE, dtype=torch.float64)
    first = noise_of(rows, max_norm=1.0, noise_multiplier=1.0)
    assert torch.equal(first, noise_of(rows, max_norm=1.0, noise_multiplier=1.0))
    other = noise_of(rows, max_norm=1.0, noise_multiplier=1.0, number=1)
    assert abs(float(np.corrcoef(first.flatten(), other.flatten())[0, 1])) < 6 / math.sqrt(first.numel())


def test_noise_goes_beyond_what_float32_normals_can_reach() -> None:
    """torch's float32 normals end at 5.768, which by itself would tell neighbours apart."""
    noise = noise_of(torch.zeros(100_000, 25, dtype=torch.float64), max_norm=1.0, noise_multiplier=1.0)
    assert noise.abs().max() > 4.8
    sent = noise_of(torch.zeros(8, 3), max_norm=1.0, noise_multiplier=1.0)
    assert sent.dtype is torch.float32


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), st.floats(1e-3, 1e3))
def test_clipped_rows_keep_their_direction_and_norms_are_at_most_the_bound(row: list[float], bound: float) -> None:
    rows = torch.tensor([row, [0.0, 0.0, 0.0]], dtype=torch.float64)
    clipped = clip_rows(rows, max_norm=bound)
    norm = math.hypot(*row)
    expected = rows[0] if norm <= bound else rows[0] * (bound / norm)
    assert torch.allclose(clipped[0], expected, rtol=1e-12, atol=0)
    assert math.hypot(*clipped[0].tolist()) <= bound * (1 + 1e-15)
    assert not clipped[1].any()


def test_the_gradient_of_the_clip_is_that_of_finite_differences() -> None:
    rows = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: clip_rows(r, max_norm=1.5), (rows,))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_leaves_as_noise_alone_and_has_no_gradient(bad: float) -> None:
    rows = torch.tensor([[1.0, bad], [3.0, 4.0]], requires_grad=True)
    clipped = clip_rows(rows, max_norm=1.0)
    assert torch.equal(clipped[0], torch.zeros(2))
    clipped.sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad[0], torch.zeros(2))
    assert torch.isfinite(rows.grad).all()
    sent = noised_rows(rows, max_norm=1.0, noise_multiplier=1.0, stream=RandomStream.from_insecure_seed(0), number=0)
    assert torch.isfinite(sent).all()
    assert not sent.requires_grad


def test_rows_are_clipped_again_whatever_came() -> None:
    sent = noised_rows(
        torch.full((1, 4), 1e6),
        max_norm=1.0,
        noise_multiplier=1e-6,
        stream=RandomStream.from_insecure_seed(0),
        number=0,
    )
    assert sent.norm() < 1.001


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_come_back_in_their_dtype_and_shape(dtype: torch.dtype) -> None:
    stream = RandomStream.from_insecure_seed(0)
    for shape in ((3, 2, 2), (0, 2), (1,)):
        sent = noised_rows(torch.ones(shape, dtype=dtype), max_norm=1.0, noise_multiplier=1.0, stream=stream, number=0)
        assert (sent.dtype, sent.shape) == (dtype, torch.Size(shape))


@pytest.mark.parametrize("release", [CutRelease, GradientRelease])
@pytest.mark.parametrize("bad", [None, 0, -1.0, math.inf, math.nan, True, "1"])
def test_noise_without_clipping_is_refused(release: type, bad: object) -> None:
    with pytest.raises(ParameterError, match="not clipped protects nothing"):
        release(max_norm=bad, noise_multiplier=1.0)


@pytest.mark.parametrize("release", [CutRelease, GradientRelease])
def test_clipping_without_noise_is_refused(release: type) -> None:
    with pytest.raises(ParameterError, match="released as they are"):
        release(max_norm=1.0, noise_multiplier=0.0)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ParameterError):
            release(max_norm=1.0, noise_multiplier=bad)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ParameterError, match="per_step"):
        CutRelease(max_norm=1.0, noise_multiplier=1.0, mode="each_epoch")  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [torch.ones(3, dtype=torch.int64), torch.tensor(1.0)])
def test_what_is_not_rows_of_reals_is_refused(rows: Tensor) -> None:
    with pytest.raises(ModelError, match="axis 0"):
        noised_rows(rows, max_norm=1.0, noise_multiplier=1.0, stream=RandomStream.from_os(), number=0)
