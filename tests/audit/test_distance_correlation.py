"""Distance correlation, against sums written out as loops over pairs, and against what it must be in known cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpdl.audit import biased_distance_correlation, distance_correlation
from dpdl.errors import ParameterError

Matrix = NDArray[np.float64]


def distances_by_loop(rows: Matrix) -> Matrix:
    n = len(rows)
    found = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            found[i, j] = math.sqrt(float(((rows[i] - rows[j]) ** 2).sum()))
    return found


def covariance_by_loop(a: Matrix, b: Matrix, *, unbiased: bool) -> float:
    """Székely and Rizzo 2014, definition 2 and (3.3), or Székely et al. 2007, definition 3, term by term."""
    n = len(a)

    def centred(m: Matrix, i: int, j: int) -> float:
        row, column, total = sum(m[i, :]), sum(m[:, j]), m.sum()
        if unbiased:
            return 0.0 if i == j else m[i, j] - row / (n - 2) - column / (n - 2) + total / ((n - 1) * (n - 2))
        return m[i, j] - row / n - column / n + total / n**2

    total = 0.0
    for i in range(n):
        for j in range(n):
            total += centred(a, i, j) * centred(b, i, j)
    return total / (n * (n - 3)) if unbiased else total / n**2


def correlation_by_loop(x: Matrix, z: Matrix, *, unbiased: bool) -> float:
    a, b = distances_by_loop(x), distances_by_loop(z)
    both = covariance_by_loop(a, b, unbiased=unbiased)
    own = covariance_by_loop(a, a, unbiased=unbiased) * covariance_by_loop(b, b, unbiased=unbiased)
    return both / math.sqrt(own)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("n", "d", "k"), [(4, 1, 1), (7, 3, 2), (20, 5, 9)])
def test_both_statistics_are_those_of_a_loop_over_pairs(n: int, d: int, k: int) -> None:
    x = normal(n, n, d)
    z = torch.tanh(x[:, :1] + 0.3 * normal(n + 1, n, k))
    unbiased = correlation_by_loop(x.numpy(), z.numpy(), unbiased=True)
    biased = correlation_by_loop(x.numpy(), z.numpy(), unbiased=False)
    assert distance_correlation(x, z).item() == pytest.approx(unbiased, abs=1e-12)
    assert biased_distance_correlation(x, z).item() == pytest.approx(math.sqrt(biased), abs=1e-12)
    assert abs(unbiased - biased) > 1e-3  # one does not pass for the other


def test_axes_after_the_first_are_one_vector() -> None:
    x, z = normal(0, 12, 2, 3, 4), normal(1, 12, 5)
    assert distance_correlation(x, z) == distance_correlation(x.flatten(1), z)


def test_independent_data_have_none_without_bias_and_nearly_all_with_it() -> None:
    """At 64 rows of 784 and 128 dimensions: .965 for what is mostly used, and about 0 for what is used here."""
    pairs = [(normal(i, 64, 784), normal(100 + i, 64, 128)) for i in range(20)]
    unbiased = torch.stack([distance_correlation(x, z) for x, z in pairs])
    biased = torch.stack([biased_distance_correlation(x, z) for x, z in pairs])
    error = unbiased.std() / math.sqrt(len(pairs))
    assert abs(unbiased.mean()) < 4 * error < 0.03
    assert bool((unbiased < 0).any())
    assert float(biased.mean()) == pytest.approx(0.965, abs=0.002)
    # The check on the mean would notice a bias of a tenth of the other statistic's.
    assert float(biased.mean()) / 10 > 4 * error


def test_it_is_one_for_what_keeps_distances_up_to_scale_and_less_for_the_rest() -> None:
    x = normal(0, 30, 6)
    rotation, _ = torch.linalg.qr(normal(1, 6, 6))
    assert distance_correlation(x, 2.5 * x @ rotation + 1).item() == pytest.approx(1, abs=1e-12)
    assert 0.2 < distance_correlation(x, x[:, :2]).item() < 0.9
    assert distance_correlation(x, x[:, :2]) == distance_correlation(x[:, :2], x)


def test_rows_that_tell_nothing_have_none_with_a_finite_gradient() -> None:
    """Collapsed activations, and rows with equal distances, whose centred distances are rounding."""
    x = normal(0, 8, 3)
    for rows in (torch.ones(8, 2, dtype=torch.float64), torch.eye(8, dtype=torch.float64) * 1e5):
        z = rows.requires_grad_()
        for measure in (distance_correlation, biased_distance_correlation):
            found = measure(x, z)
            (gradient,) = torch.autograd.grad(found, z, allow_unused=True, retain_graph=True)
            assert found == 0 or measure is biased_distance_correlation
            assert gradient is None or torch.isfinite(gradient).all()
        assert distance_correlation(x, z) == 0


def test_its_gradient_is_that_of_differences_and_finite_at_ties() -> None:
    x, z = normal(0, 6, 3), normal(1, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: distance_correlation(x, rows), (z,))
    assert torch.autograd.gradcheck(lambda rows: biased_distance_correlation(x, rows), (z,))
    tied = torch.cat([z.detach()[:5], z.detach()[:1]]).requires_grad_()
    distance_correlation(x, tied).backward()
    assert tied.grad is not None
    assert torch.isfinite(tied.grad).all()
    assert tied.grad.abs().sum() > 0


def test_no_tensor_of_all_pairs_and_dimensions_is_made() -> None:
    """512 rows of 4096 numbers: all pairs of rows would be 4.3 GB in float32."""
    x, z = normal(0, 512, 4096, dtype=torch.float32), normal(1, 512, 16, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        distance_correlation(x, z)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest <= 20 * 512 * 512 * 4  # of one kind of operation, all its calls together


def test_halves_are_measured_in_float32() -> None:
    x, z = normal(0, 16, 5), normal(1, 16, 4)
    found = distance_correlation(x.to(torch.bfloat16), z.to(torch.float16))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(distance_correlation(x, z).item(), abs=0.05)


@pytest.mark.parametrize(
    ("x", "z", "said"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 2), "at least 4 rows, got 3"),
        (torch.zeros(8, 2), torch.zeros(7, 2), "x has 8 rows and z has 7"),
        (torch.zeros(8, 2, dtype=torch.int64), torch.zeros(8, 2), "x must be a floating point tensor"),
        (torch.zeros(8, 2), torch.tensor(1.0), "z must be a floating point tensor"),
    ],
)
def test_what_cannot_be_measured_is_refused(x: Tensor, z: Tensor, said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        distance_correlation(x, z)
