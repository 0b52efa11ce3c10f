"""A convolution's contribution, each way in turn, against plain autograd on one example at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dpdl.per_sample.tape import convolution, convolution_gradients
from dpdl.per_sample.tape.contribution import Contribution, Materialized
from dpdl.per_sample.tape.convolution import WAYS, ConvolutionContribution, Geometry, Layer, fastest_way
from dpdl.per_sample.tape.convolution_gram import gram_norms

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
EACH_WAY = pytest.mark.parametrize("way", WAYS)
EACH_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Operands of one use in float64, and the per-sample gradients by the oracle, [N, o, i, *u]."""

    x: Tensor
    g: Tensor
    shape: tuple[int, ...]
    geometry: Geometry
    gradients: Tensor

    def contribution(self, way: str | None, dtype: torch.dtype = torch.float64) -> ConvolutionContribution:
        return ConvolutionContribution(self.x.to(dtype), self.g.to(dtype), self.shape, self.geometry, way=way)

    @property
    def norms_squared(self) -> Tensor:
        return self.gradients.flatten(1).square().sum(1)


def made(geometry: Geometry, *, n: int, k: int, i: int, o: int, sizes: tuple[int, ...], seed: int = 0) -> Case:
    """A forward pass and a backward pass of plain PyTorch for each example by itself."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight = normal(n, k, i * geometry.groups, *sizes), normal(o * geometry.groups, i, *geometry.kernel_size)
    weight.requires_grad_()
    rows, cotangents = [], []
    for example in x:
        y = CONVOLVE[len(sizes)](
            example, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
        cotangents.append(normal(*y.shape))
        rows.append(torch.autograd.grad((y * cotangents[-1]).sum(), weight)[0])
    return Case(
        x=x, g=torch.stack(cotangents), shape=tuple(weight.shape), geometry=geometry, gradients=torch.stack(rows)
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    spatial = draw(st.integers(1, 3))

    def tuples(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(spatial))

    geometry = Geometry(
        kernel_size=tuples(1, 3),
        stride=tuples(1, 3),
        padding=tuples(0, 3),
        dilation=tuples(1, 3),
        groups=draw(st.integers(1, 3)),
    )
    least = (
        max(1, dilation * (kernel - 1) + 1 - 2 * padding)
        for kernel, padding, dilation in zip(geometry.kernel_size, geometry.padding, geometry.dilation, strict=True)
    )
    sizes = tuple(size + draw(st.integers(0, 3)) for size in least)
    small = st.integers(1, 3)
    n, k, i, o = (draw(small) for _ in range(4))
    return made(geometry, n=n, k=k, i=i, o=o, sizes=sizes, seed=draw(st.integers(0, 2**31)))


def usual(*, n: int = 4, k: int = 1, groups: int = 1, seed: int = 0) -> Case:
    geometry = Geometry(kernel_size=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=groups)
    return made(geometry, n=n, k=k, i=2, o=3, sizes=(6, 5), seed=seed)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance of the greatest number of an example (gradients), or of each number (norms)."""
    assert found.dtype == dtype
    assert found.shape == expected.shape
    scale = expected.abs().flatten(1).amax(1) if expected.dim() > 1 else expected.abs()
    distance = (found.double() - expected).abs().flatten(1).amax(1) if expected.dim() > 1 else (found - expected).abs()
    assert bool((distance <= TOLERANCE[dtype] * scale + 1e-150).all()), f"{distance / scale}"


def check(contribution: Contribution, case: Case, dtype: torch.dtype) -> None:
    """Everything a contribution answers, with the weighted sum asked first, between and last."""
    weights = torch.linspace(-1.0, 2.0, len(case.x), dtype=torch.float64)
    expected = torch.einsum("n,n...->...", weights, case.gradients)[None]
    size = case.gradients.abs().sum(0).max()

    def sum_is_right() -> None:
        found = contribution.weighted_sum(weights.to(dtype))
        assert found.shape == case.shape
        assert bool(((found.double() - expected[0]).abs() <= TOLERANCE[dtype] * size).all())

    sum_is_right()
    close(contribution.materialize(), case.gradients, dtype)
    for _ in range(2):
        close(contribution.norms_squared().sqrt(), case.norms_squared.sqrt(), dtype)
        sum_is_right()
        close(contribution.materialize(), case.gradients, dtype)


@EACH_WAY
@EACH_DTYPE
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_every_way_agrees_with_autograd(way: str, dtype: torch.dtype, case: Case) -> None:
    check(case.contribution(way, dtype), case, dtype)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_the_way_that_is_chosen_agrees_with_autograd(case: Case) -> None:
    check(case.contribution(None), case, torch.float64)


@EACH_WAY
@EACH_DTYPE
@pytest.mark.parametrize("limit", [0.0, math.inf])
@pytest.mark.parametrize("block", [1, 200, 2**20])
def test_blocks_and_keeping_change_no_number(
    way: str, dtype: torch.dtype, limit: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "KEPT_OVER_OPERANDS", limit)
    monkeypatch.setattr(convolution_gradients, "CPU_BLOCK", dict.fromkeys(WAYS, block))
    case = usual(n=5, k=2, groups=2)
    check(case.contribution(way, dtype), case, dtype)


@pytest.mark.parametrize(("limit", "kept"), [(0.0, False), (math.inf, True)])
def test_operands_are_dropped_where_gradients_are_kept(
    limit: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "KEPT_OVER_OPERANDS", limit)
    contribution = usual().contribution("windows")
    contribution.norms_squared()
    assert (contribution._operands is None) is kept
    assert (contribution._gradients is not None) is kept


@st.composite
def transposed(draw: st.DrawFn) -> tuple[Case, int]:
    """A transposed convolution, as the convolution with its operands exchanged."""
    spatial = draw(st.integers(1, 3))
    kernel, stride, dilation = (
        tuple(draw(st.integers(1, 3)) for _ in range(spatial)) for _ in ("kernel", "stride", "dilation")
    )
    padding = tuple(draw(st.integers(0, d * (k - 1) // 2)) for k, d in zip(kernel, dilation, strict=True))
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    geometry = Geometry(
        kernel_size=kernel, stride=stride, padding=padding, dilation=dilation, groups=draw(st.integers(1, 2))
    )
    n, i, o = (draw(st.integers(1, 3)) for _ in range(3))
    sizes = tuple(draw(st.integers(2, 3)) for _ in range(spatial))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    inputs = torch.randn(n, 1, i * geometry.groups, *sizes, dtype=torch.float64)
    weight = torch.randn(i * geometry.groups, o, *kernel, dtype=torch.float64, requires_grad=True)
    rows, cotangents = [], []
    for example in inputs:
        y = TRANSPOSED[spatial](example, weight, None, stride, padding, extra, geometry.groups, dilation)
        cotangents.append(torch.randn_like(y))
        rows.append(torch.autograd.grad((y * cotangents[-1]).sum(), weight)[0])
    return Case(
        x=torch.stack(cotangents), g=inputs, shape=tuple(weight.shape), geometry=geometry, gradients=torch.stack(rows)
    ), sum(extra)


@EACH_WAY
@EACH_DTYPE
@settings(max_examples=40, deadline=None)
@given(drawn=transposed())
def test_transposed_convolutions_are_convolutions_with_operands_exchanged(
    way: str, dtype: torch.dtype, drawn: tuple[Case, int]
) -> None:
    check(drawn[0].contribution(way, dtype), drawn[0], dtype)


def not_finite_in(case: Case, *, x: bool, value: float) -> Case:
    """The case with one number of example 1 replaced."""
    pair = {"x": case.x.clone(), "g": case.g.clone()}
    pair["x" if x else "g"][1].view(-1)[7] = value
    return Case(shape=case.shape, geometry=case.geometry, gradients=case.gradients, **pair)


@EACH_WAY
@EACH_DTYPE
@pytest.mark.parametrize("limit", [0.0, math.inf])
@pytest.mark.parametrize(("x", "value"), list(itertools.product([True, False], [math.nan, math.inf])))
@pytest.mark.parametrize("groups", [1, 16])
def test_an_example_that_is_not_finite_stays_alone(
    way: str, dtype: torch.dtype, limit: float, x: bool, value: float, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "KEPT_OVER_OPERANDS", limit)
    case = usual(groups=groups)
    spoilt = not_finite_in(case, x=x, value=value).contribution(way, dtype)
    others = torch.tensor([0, 2, 3])
    norms, expected = spoilt.norms_squared(), case.contribution(way, dtype).norms_squared()
    assert not torch.isfinite(norms[1])
    torch.testing.assert_close(norms[others], expected[others], rtol=1e-6, atol=0.0)
    close(spoilt.materialize()[others], case.gradients[others], dtype)
    weights = torch.tensor([0.5, 0.0, 0.25, 0.0], dtype=dtype)
    total = 0.5 * case.gradients[0] + 0.25 * case.gradients[2]
    close(spoilt.weighted_sum(weights)[None], total[None], dtype)


@EACH_WAY
@pytest.mark.parametrize("limit", [0.0, math.inf])
@pytest.mark.parametrize("first", [False, True])
def test_rows_and_double_work_before_and_after_norms(
    way: str, limit: float, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "KEPT_OVER_OPERANDS", limit)
    case = usual(k=2)
    contribution = case.contribution(way, torch.float32)
    if first:
        contribution.norms_squared()
    index = torch.tensor([3, 1])
    rows = contribution.rows(index)
    close(rows.norms_squared(), case.norms_squared[index], torch.float32)
    close(rows.materialize(), case.gradients[index], torch.float32)
    wide = contribution.double()
    assert wide.norms_squared().dtype == torch.float64
    torch.testing.assert_close(wide.norms_squared(), case.norms_squared, rtol=1e-5, atol=0.0)


def test_double_before_norms_computes_in_float64() -> None:
    case = usual()
    narrow = Case(
        x=case.x.float().double(),
        g=case.g.float().double(),
        shape=case.shape,
        geometry=case.geometry,
        gradients=case.gradients,
    )
    found, expected = narrow.contribution("windows", torch.float32).double(), narrow.contribution("windows")
    assert torch.equal(found.materialize(), expected.materialize())


@EACH_WAY
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, 3), uses=st.integers(1, 3))
def test_joined_uses_have_the_gradient_of_the_sum(way: str, seed: int, k: int, uses: int) -> None:
    each = [usual(k=k + more, seed=seed + more) for more in range(uses)]
    joined = each[0].contribution(way).joined([case.contribution(None) for case in each[1:]])
    assert joined is not None
    total = Case(
        x=each[0].x,
        g=each[0].g,
        shape=each[0].shape,
        geometry=each[0].geometry,
        gradients=sum(case.gradients for case in each),
    )
    check(joined, total, torch.float64)


def test_uses_that_differ_are_not_joined() -> None:
    case = usual()
    own = case.contribution("windows")
    other_geometry = made(
        Geometry(kernel_size=(3, 2), stride=(1, 1), padding=(1, 2), dilation=(1, 2), groups=1),
        n=4,
        k=1,
        i=2,
        o=3,
        sizes=(6, 5),
    )
    other_size = made(case.geometry, n=4, k=1, i=2, o=3, sizes=(8, 5))
    for other in (other_geometry, other_size):
        assert own.joined([other.contribution("windows")]) is None
    assert own.joined([Materialized(case.gradients)]) is None
    assert own.joined([case.contribution("windows", torch.float32)]) is None


def test_uses_already_kept_as_gradients_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "KEPT_OVER_OPERANDS", math.inf)
    kept, fresh = usual().contribution("windows"), usual().contribution("windows")
    kept.norms_squared()
    assert kept.joined([fresh]) is None
    assert fresh.joined([kept]) is None


@EACH_WAY
def test_an_empty_batch_has_empty_norms_and_a_zero_sum(way: str) -> None:
    case = usual(n=1)
    empty = ConvolutionContribution(case.x[:0], case.g[:0], case.shape, case.geometry, way=way)
    for _ in range(2):
        assert empty.norms_squared().shape == (0,)
        assert torch.equal(empty.weighted_sum(torch.zeros(0, dtype=torch.float64)), torch.zeros(case.shape).double())
        assert empty.materialize().shape == (0, *case.shape)


def images(kind: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Operands in float32 that make inner products cancel in different ways."""
    for seed in range(8):
        torch.manual_seed(seed)
        x, g = torch.randn(2, 1, 4, 12, 12), torch.randn(2, 1, 5, 12, 12)
        if kind == "bright":  # constant but for a little, and a cotangent with no mean
            x, g = 10 + x.mul(0.1), g - g.mean((3, 4), keepdim=True)
        if kind == "alternating":
            x, g = 1 + 1e-3 * x, g[..., :1, :1] * (-1.0) ** torch.arange(144).view(12, 12) + 1e-3 * g
        if kind == "smooth":
            x = torch.linspace(-3, 3, 144).view(12, 12).cos().expand(2, 1, 4, 12, 12) + 1e-2 * x
        yield x.contiguous(), g.contiguous()


@pytest.mark.parametrize("kind", ["normal", "bright", "alternating", "smooth"])
def test_gram_norms_are_not_below_the_truth_and_not_far_above(kind: str) -> None:
    geometry = Geometry(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    for x, g in images(kind):
        exact = ConvolutionContribution(x.double(), g.double(), (5, 4, 3, 3), geometry, way="windows").norms_squared()
        found = ConvolutionContribution(x, g, (5, 4, 3, 3), geometry, way="gram").norms_squared().double()
        assert bool((found >= exact * (1 - 1e-6)).all())
        close(found.sqrt().float(), exact.sqrt(), torch.float32)
        squared, error = gram_norms(x, g, geometry)
        assert bool(((squared.double() - exact).abs() <= 0.2 * error).all()), "the margin is not five-fold"


def test_gram_norms_survive_numbers_whose_squares_vanish() -> None:
    """|x|^2 is below the smallest float32, but the gradient is not: a norm of 0 would not clip it."""
    geometry = Geometry(kernel_size=(3,), stride=(1,), padding=(1,), dilation=(1,), groups=1)
    torch.manual_seed(0)
    x, g = torch.randn(3, 1, 2, 9), torch.randn(3, 1, 4, 9)
    x[1] *= 1e-25
    g[1] *= 1e18
    exact = ConvolutionContribution(x.double(), g.double(), (4, 2, 3), geometry, way="windows").norms_squared()
    close(ConvolutionContribution(x, g, (4, 2, 3), geometry, way="gram").norms_squared(), exact, torch.float32)


def layer(i: int, o: int, size: int, kernel: int, *, groups: int = 1) -> Layer:
    pair = (kernel // 2,) * 2
    geometry = Geometry(kernel_size=(kernel,) * 2, stride=(1, 1), padding=pair, dilation=(1, 1), groups=groups)
    return Layer(images=1, sizes=(size, size), outputs=(size, size), shape=(o, i, kernel, kernel), geometry=geometry)


def test_few_positions_and_many_channels_take_inner_products() -> None:
    assert fastest_way(layer(256, 256, 8, 3), False, "cpu") == "gram"
    assert fastest_way(layer(512, 512, 4, 3), False, "cpu") == "gram"


def test_many_positions_and_few_channels_take_gradients() -> None:
    for early in (layer(3, 32, 32, 3), layer(64, 64, 32, 3), layer(1, 1, 32, 3, groups=64)):
        assert fastest_way(early, True, "cpu") != "gram"


def test_grouped_convolutions_stay_on_the_cpu() -> None:
    many = [layer(i, o, size, 3) for i, o, size in itertools.product((16, 32, 64), (32, 64), (8, 16, 32))]
    assert any(fastest_way(each, True, "cpu") == "grouped" for each in many)
    assert not any(fastest_way(each, True, "cuda") == "grouped" for each in many)


def test_one_layer_is_predicted_once() -> None:
    before = fastest_way.cache_info().currsize
    for n in (2, 3, 4):
        usual(n=n, seed=5).contribution(None).norms_squared()
    assert fastest_way.cache_info().currsize <= before + 1
