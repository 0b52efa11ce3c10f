"""Norms behind derivations that act on each row alone, beside autograd, one example at a time in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpdl.per_sample.tape.contribution import Contribution, Materialized
from dpdl.per_sample.tape.convolution import ConvolutionContribution, Geometry
from dpdl.per_sample.tape.rowwise import rowwise_pull_back
from dpdl.per_sample.tape.source import Source
from tests.per_sample.tape.against_autograd import Numbers, Using, check, dtypes

Derivation = Callable[..., Tensor]
REST = (1, 2, 3)


def scaled_standardised(v: Tensor, s: Tensor) -> Tensor:
    variance, mean = torch.var_mean(v, dim=REST, keepdim=True, correction=0)
    return (v - mean) * torch.rsqrt(torch.clamp(variance * v[0].numel(), min=1e-4))


def by_batch_norm(v: Tensor, s: Tensor) -> Tensor:
    rows = v.reshape(1, len(v), -1)
    return F.batch_norm(rows, None, None, weight=(0.3 * s).view(-1), training=True, momentum=0.0).reshape_as(v)


# Of v [o, i, h, w] and s [o, 1, 1, 1].
BY_ROW: dict[str, Derivation] = {
    "standardised": scaled_standardised,
    "standardised, all rows clamped": lambda v, s: scaled_standardised(1e-4 * v, s),
    "standardised with a gain": lambda v, s: s * (v - v.mean(REST, True)) / (v.std(REST, keepdim=True) + 1e-5),
    "by batch norm": by_batch_norm,
    "weight norm": lambda v, s: torch._weight_norm(v, s, 0),
    "F.normalize": lambda v, s: F.normalize(v.flatten(1)).view_as(v),
    "over its norm": lambda v, s: v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1),
    "centred": lambda v, s: v - v.mean(REST, keepdim=True),
    "mean only": lambda v, s: v.mean(REST, keepdim=True) + s.expand_as(v),
    "number by number": lambda v, s: v.exp() * 2,
    "number by number and a gain": lambda v, s: torch.tanh(v) * s.exp(),
    "two ways": lambda v, s: 0.5 * v - v.sin() + v.square().sum(REST, keepdim=True),
    "masked": lambda v, s: v * (torch.arange(v.shape[-1]) < 1) - s,
    "masked and centred": lambda v, s: F.normalize(v.masked_fill(v.detach() > 1, 0.0).flatten(1) - 0.1).view_as(v),
    "a square": lambda v, s: v * v,
    "ratio": lambda v, s: v / (2 + s.square()),
}
MIXED: dict[str, Derivation] = {
    "softmax over rows": lambda v, s: v.softmax(0),
    "one norm of all": lambda v, s: v / v.norm(),
    "sum over rows": lambda v, s: v - v.mean(0, keepdim=True),
    "part of a row": lambda v, s: v - v.mean((2, 3), keepdim=True),
    "rows changed about": lambda v, s: v.flip(0).exp(),
    "transposed": lambda v, s: v.transpose(0, 1).exp(),
    "channels scaled": lambda v, s: v * s.view(1, -1, 1, 1)[:, : v.shape[1]],
    "product of matrices": lambda v, s: (v.flatten(1) @ v.flatten(1).t() @ v.flatten(1)).view_as(v),
}


def derived(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Source, dict[str, Tensor]]:
    numbers = Numbers(1)
    parameters = {"v": numbers(*shape), "s": numbers(shape[0], 1, 1, 1)}
    parameters = {key: value.to(dtype).requires_grad_() for key, value in parameters.items()}
    tensor = (BY_ROW | MIXED)[name](parameters["v"], parameters["s"])
    source = Source(key=name, tensor=tensor, parameters=("v", "s"), moved=False, version=tensor._version)
    return source, parameters


def true_squares(name: str, parameters: dict[str, Tensor], gradients: Tensor) -> Tensor:
    wide = {key: value.detach().double().requires_grad_() for key, value in parameters.items()}
    tensor = BY_ROW[name](wide["v"], wide["s"])
    found = []
    for gradient in gradients.double():
        parts = torch.autograd.grad(tensor, list(wide.values()), gradient, retain_graph=True, allow_unused=True)
        found.append(sum((part.square().sum() for part in parts if part is not None), torch.zeros(()).double()))
    return torch.stack(found)


@pytest.mark.parametrize("name", BY_ROW)
@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 4), o=st.integers(1, 5), i=st.integers(1, 3), k=st.integers(1, 3), dtype=dtypes)
def test_norms_by_rows_are_those_of_gradients_pulled_back(
    name: str, n: int, o: int, i: int, k: int, dtype: torch.dtype
) -> None:
    if i * k == 1:
        i = 2
    source, parameters = derived(name, (o, i, k, k), dtype)
    way = rowwise_pull_back(source, parameters)
    assert way is not None
    gradients = Numbers(2)(n, o, i, k, k).to(dtype)
    squares, unsure = way.norms_squared(Materialized(gradients))
    truth, sure = true_squares(name, parameters, gradients), ~unsure
    wide = torch.finfo(dtype).eps ** 0.5  # of float64 nothing has to be sure: two numbers a row cancel altogether
    assert bool((squares.double()[sure] >= truth[sure] * (1 - 1e-5)).all())
    torch.testing.assert_close(
        squares.double()[sure], truth[sure], rtol=max(3e-3 if dtype == torch.float32 else wide, 1e-9), atol=0
    )


@pytest.mark.parametrize("name", sorted(set(BY_ROW) - {"mean only", "two ways"}))  # small beside what they come of
def test_no_norms_of_ordinary_layers_are_left_to_the_general_way(name: str) -> None:
    source, parameters = derived(name, (8, 16, 3, 3), torch.float32)
    way = rowwise_pull_back(source, parameters)
    assert way is not None
    gradients = Numbers(3)(6, 8, 16, 3, 3).float()
    squares, unsure = way.norms_squared(Materialized(gradients))
    truth = true_squares(name, parameters, gradients)
    assert not bool(unsure.any())
    assert bool((squares.double() >= truth * (1 - 1e-6)).all())
    torch.testing.assert_close(squares.double(), truth, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_rows_is_left_to_the_general_way(name: str) -> None:
    source, parameters = derived(name, (4, 4, 2, 2), torch.float64)
    assert rowwise_pull_back(source, parameters) is None


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e-6, 0.0])
def test_gradients_that_cancel_are_seen(factor: float) -> None:
    """Along the weight a normalised weight's gradient vanishes; what is left is smaller than rounding shows."""
    source, parameters = derived("F.normalize", (2, 6, 2, 2), torch.float32)
    way = rowwise_pull_back(source, parameters)
    assert way is not None
    along, other = source.tensor.detach().unsqueeze(0), Numbers(4)(1, 2, 6, 2, 2).float()
    gradients = along + factor * other
    squares, unsure = way.norms_squared(Materialized(gradients))
    truth = true_squares("F.normalize", parameters, gradients)
    assert bool((squares >= truth * (1 - 1e-6)).all())
    assert bool(unsure.all()) == (factor < 1e-2)


def test_gradients_that_cancel_are_pulled_back_one_by_one() -> None:
    """All the way through the engine: an input along the weight."""
    w = Numbers(5)(3, 8)
    model = Using(lambda m, x: F.linear(x, F.normalize(m.w)), w=w)
    check(model, torch.stack([F.normalize(w)[0] * 3, Numbers(6)(8), F.normalize(w)[1] + 1e-3 * Numbers(7)(8)]),
          dtype=torch.float32)  # fmt: skip


def test_an_example_that_is_not_finite_leaves_others_as_they_were() -> None:
    source, parameters = derived("standardised", (4, 3, 3, 3), torch.float32)
    way = rowwise_pull_back(source, parameters)
    assert way is not None
    gradients = Numbers(8)(3, 4, 3, 3, 3).float()
    before, _ = way.norms_squared(Materialized(gradients))
    gradients[1, 0, 0, 0, 0], gradients[1, 2, 0, 0, 0] = float("nan"), float("inf")
    after, unsure = way.norms_squared(Materialized(gradients))
    assert unsure.tolist() == [False, True, False]
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_gradients_seen_block_by_block_are_kept_where_they_are_small() -> None:
    numbers = Numbers(9)
    geometry = Geometry(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    for shape, size, kept in (((4, 3, 3, 3), 8, True), ((32, 32, 3, 3), 2, False)):
        x, g = numbers(5, 1, shape[1], size, size), numbers(5, 1, shape[0], size, size)

        def contribution(x: Tensor = x, g: Tensor = g, shape: tuple[int, ...] = shape) -> ConvolutionContribution:
            return ConvolutionContribution(x, g, shape, geometry)

        part: Contribution = contribution()
        assert isinstance(part, ConvolutionContribution)
        truth = contribution().materialize()
        for _ in range(2):
            torch.testing.assert_close(torch.cat(list(part.gradient_blocks())), truth)
            assert (part.way == "kept") == kept
        weights = torch.rand(5, dtype=torch.float64)
        torch.testing.assert_close(part.weighted_sum(weights), torch.einsum("n,n...->...", weights, truth))
