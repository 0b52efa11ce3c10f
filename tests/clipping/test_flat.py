"""Flat clipping: nothing longer than C, nothing shorter touched, nothing that is no number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpdl.clipping import flat_weights
from dpdl.clipping.flat import ROUNDINGS
from dpdl.errors import ParameterError
from dpdl.per_sample.materialized import MaterializedGradients

DTYPES = st.sampled_from([torch.float32, torch.float64])
CLIPS = st.floats(1e-6, 1e6)


def test_short_gradients_are_left_alone_and_long_ones_brought_to_the_bound() -> None:
    weights = flat_weights(torch.tensor([0.0, 0.5, 2.0, 4.0]), max_grad_norm=1.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 0.5, 0.25]), rtol=1e-5, atol=0.0)
    assert (weights[:2] == 1.0).all()


def test_a_norm_that_is_no_number_gives_zero() -> None:
    norms = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert flat_weights(norms, max_grad_norm=2.0).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_unbounded_clipping_keeps_every_finite_gradient_and_drops_the_rest() -> None:
    norms = torch.tensor([0.0, 1e-30, 1.0, 3e38, math.inf, math.nan])
    assert flat_weights(norms, max_grad_norm=math.inf).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_no_examples_no_weights() -> None:
    assert flat_weights(torch.zeros(0), max_grad_norm=1.0).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_come_in_the_dtype_of_the_norms(dtype: torch.dtype) -> None:
    weights = flat_weights(torch.tensor([0.5, 2.0, math.nan], dtype=dtype), max_grad_norm=1.0)
    assert weights.dtype == dtype


@pytest.mark.parametrize("value", [0.0, -1.0, -math.inf, math.nan])
def test_a_bound_that_is_not_positive_is_refused(value: float) -> None:
    with pytest.raises(ParameterError, match=r"max_grad_norm must be > 0, got .*unwrapped"):
        flat_weights(torch.ones(1), max_grad_norm=value)


@given(norm=st.floats(0.0, 1e20), clip=CLIPS, dtype=DTYPES)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_product_of_weight_and_norm_is_at_most_the_bound(norm: float, clip: float, dtype: torch.dtype) -> None:
    norms = torch.tensor([norm], dtype=dtype)
    weight = flat_weights(norms, max_grad_norm=clip)
    assert 0.0 <= float(weight) <= 1.0
    assert float(weight.double() * norms.double()) <= clip


@pytest.mark.parametrize("clip", [1e-6, 1e-3, 0.01, 0.1, 1.0, 1e3])
def test_that_holds_for_the_longest_gradients_too(clip: float) -> None:
    """C / norm then lies among the denormals, where a rounding is no longer a small part of the value."""
    norms = torch.logspace(20, 38.5, 5000, dtype=torch.float64).float()
    weights = flat_weights(norms, max_grad_norm=clip)
    assert float((weights.double() * norms.double()).max()) <= clip


@given(norms=st.lists(st.floats(0.0, 1e10), min_size=2, max_size=20), clip=CLIPS, dtype=DTYPES)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_longer_gradient_never_has_a_larger_weight(norms: list[float], clip: float, dtype: torch.dtype) -> None:
    weights = flat_weights(torch.tensor(sorted(norms), dtype=dtype), max_grad_norm=clip)
    assert (weights[1:] <= weights[:-1]).all()


@given(norm=st.floats(1e-3, 1e10), clip=CLIPS, dtype=DTYPES)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_more_is_cut_off_than_rounding_asks_for(norm: float, clip: float, dtype: torch.dtype) -> None:
    weight = float(flat_weights(torch.tensor([norm], dtype=dtype), max_grad_norm=clip))
    kept = min(1.0, clip / float(torch.tensor(norm, dtype=dtype)))
    assert weight >= kept * (1 - 2 * ROUNDINGS * torch.finfo(dtype).eps)


PATTERNS = {
    "normal": lambda d: torch.randn(d, generator=torch.Generator().manual_seed(d)),
    "equal": lambda d: torch.full((d,), 0.1),
    "one large": lambda d: torch.cat([torch.ones(1), torch.full((d - 1,), 1e-3)]),
    "falling": lambda d: torch.arange(1, d + 1).reciprocal(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dimensions", [1, 7, 1000, 10**6, 10**7])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_clipped_gradient_is_no_longer_than_the_bound(pattern: str, dimensions: int, dtype: torch.dtype) -> None:
    """Norm, weight and product are all rounded; what enters the sum must still fit, in 1 or 10^7 numbers."""
    if dimensions == 10**7 and dtype == torch.float64:
        dimensions = 10**6 + 1
    gradient = PATTERNS[pattern](dimensions).to(dtype)
    held = MaterializedGradients(tensors={"w": gradient.unsqueeze(0)}, accumulate_dtype=torch.float32)
    norm = held.norms()
    for clip in (0.1, float(norm) * (1 - 1e-7)):
        clipped = held.weighted_sum(flat_weights(norm, max_grad_norm=clip))["w"]
        assert length(clipped) <= clip


def length(vector: torch.Tensor) -> float:
    """L2 norm in float64, by sums of at most a thousand numbers: relative error below 1e-15."""
    squares = vector.double().square()
    while len(squares) > 1000:
        squares = torch.cat([squares, squares.new_zeros(-len(squares) % 1000)]).view(-1, 1000).sum(1)
    return math.sqrt(math.fsum(squares.tolist())) * (1 - 1e-14)
