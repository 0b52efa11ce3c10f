"""Numbers that are not finite, and numbers of few bits: what they may and may not do to gradients by rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.tape import TapeEngine
from tests.per_sample.tape.against_autograd import (
    Numbers,
    Using,
    check,
    cotangents_of,
    prepared,
    relative,
    truth,
    weights_of,
)
from tests.per_sample.tape.families import FAMILIES

each_family = pytest.mark.parametrize("name", FAMILIES)


def passed(module: nn.Module, x: Tensor, cotangent: Tensor | None = None) -> tuple[Tensor, Any, Tensor]:
    """Outputs, gradients of a pass, and the cotangent that was used."""
    forward = TapeEngine(module).forward(ExampleBatch.from_call((x,), {}), dict(module.named_parameters()))
    (output,) = forward.outputs
    cotangent = cotangents_of([tuple(output.shape)])[0].to(output.dtype) if cotangent is None else cotangent
    with torch.no_grad():
        (part,) = forward.pull_back({0: cotangent})
    return output, part, cotangent


@each_family
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["input", "gradient"])
def test_a_number_that_is_not_finite_stays_with_its_example(name: str, where: str, value: float) -> None:
    family, bad = FAMILIES[name], 1
    if where == "input" and family.vocabulary:
        pytest.skip("tokens are integers")
    module, x, others = family.module(), family.inputs(4), [0, 2, 3]
    true = truth(module, (x,))
    _, _, cotangent = passed(module, x)
    if where == "input":
        x[bad] = value
    else:
        cotangent[bad] = value
    _, part, _ = passed(module, x, cotangent)
    norms = part.norms()
    torch.testing.assert_close(norms[others], true.norms[others], rtol=1e-9, atol=0)
    finite = bool(torch.isfinite(truth_of_one(module, x[bad : bad + 1], cotangent[bad : bad + 1])))
    assert bool(torch.isfinite(norms[bad])) is finite
    weights = weights_of(4)
    assert weights[bad] == 0
    found, rows = part.weighted_sum(weights), part.materialize()
    for parameter, gradient in true.gradients.items():
        assert relative(found[parameter], true.weighted[parameter], float(true.norms.max())) < 1e-10
        assert relative(rows[parameter][others], gradient[others], float(true.norms.max())) < 1e-10


def truth_of_one(module: nn.Module, x: Tensor, cotangent: Tensor) -> Tensor:
    """The norm of one example's gradient."""
    found = torch.autograd.grad((module(x) * cotangent).sum(), list(module.parameters()), allow_unused=True)
    return torch.stack([g.square().sum() for g in found if g is not None]).sum().sqrt()


def assert_norms_cover_what_is_summed(part: Any, n: int) -> None:
    """With weight on one example only, the sum is its gradient; clipping by the norm must bring it to the limit."""
    norms = part.norms()
    for example in range(n):
        alone = torch.zeros_like(norms)
        alone[example] = 1.0
        total = part.weighted_sum(alone)
        assert all(t.dtype in (torch.float32, torch.float64) for t in total.values())
        length = float(torch.stack([t.double().square().sum() for t in total.values()]).sum().sqrt())
        assert length <= float(norms[example]) * (1 + 1e-5), example


@each_family
def test_autocast_to_bfloat16(name: str) -> None:
    """As near to full precision as plain training under autocast is, and norms are those of what is summed."""
    family, n = FAMILIES[name], 4
    module, (x,) = prepared(family.module(), (family.inputs(n),), torch.float32)
    true = truth(module, (x,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, part, cotangent = passed(module, x)
        plain = module(x)
        assert output.dtype == plain.dtype
        torch.testing.assert_close(output, plain, rtol=0.05, atol=0.05)
        found = torch.autograd.grad(plain, list(module.parameters()), cotangent, allow_unused=True)
    assert part.norms().dtype in (torch.float32, torch.float64)
    assert_norms_cover_what_is_summed(part, n)
    total = part.weighted_sum(torch.ones(n))
    whole = float(torch.stack([g.sum(0).square().sum() for g in true.gradients.values()]).sum().sqrt())
    for (parameter, rows), g in zip(true.gradients.items(), found, strict=True):
        ours = float((total[parameter].double() - rows.sum(0)).norm())
        torchs = float((g.double() - rows.sum(0)).norm()) if g is not None else 0.0
        assert ours <= 2 * torchs + 0.02 * whole, (parameter, ours / whole, torchs / whole)


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_parameters_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """Sums and norms are taken in float32; what differs from the truth is the rounding of the forward."""
    family, n = FAMILIES[name], 4
    module, (x,) = prepared(family.module(), (family.inputs(n),), dtype)
    true = truth(module, (x,))
    _, part, _ = passed(module, x)
    assert part.norms().dtype == torch.float32
    assert_norms_cover_what_is_summed(part, n)
    total = part.weighted_sum(weights_of(n))
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    scale = float((weights_of(n) * true.norms).sum())
    for parameter, expected in true.weighted.items():
        assert relative(total[parameter], expected, scale) <= tolerance, parameter
    assert relative(part.norms(), true.norms) <= tolerance


@pytest.mark.parametrize("name", ["convolution", "depthwise convolution", "transposed convolution"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_channels_last(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    for n in (1, 4):
        x = family.inputs(n)
        check(family.module(), x.contiguous(memory_format=torch.channels_last), dtype=dtype)
        module = family.module().to(memory_format=torch.channels_last)
        check(module, x.contiguous(memory_format=torch.channels_last), dtype=dtype)
        check(module, x, dtype=dtype)


@each_family
def test_inputs_that_are_not_contiguous(name: str) -> None:
    family = FAMILIES[name]
    x = family.inputs(4)
    strided = torch.stack([x, x.flip(0)], -1)[..., 0]
    turned = x.movedim(0, -1).contiguous().movedim(-1, 0)
    for one in (strided, turned, x.flip(-1), x[:1].expand_as(x)):
        check(family.module(), one, fewer_too=False)


@pytest.mark.parametrize("name", ["linear", "views", "derived", "repeated", "positions", "embedding", "convolution"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bfloat16", "float16", "float32"]
)
def test_the_sum_of_many_moves_by_no_more_than_one_gradient(name: str, dtype: torch.dtype) -> None:
    """A sum of a thousand gradients of norm 1, rounded to eight bits, would move by several when one is left out."""
    family, n = FAMILIES[name], 1000
    module, (x,) = prepared(family.module(), (family.inputs(n).abs(),), dtype)
    output = module(x[:1])
    _, part, _ = passed(module, x, torch.ones(n, *output.shape[1:], dtype=output.dtype))
    weights = 1 / part.norms()
    whole = part.weighted_sum(weights)
    for left_out in range(5):
        fewer = weights.clone()
        fewer[left_out] = 0
        change = {parameter: total - whole[parameter] for parameter, total in part.weighted_sum(fewer).items()}
        assert float(torch.stack([c.double().square().sum() for c in change.values()]).sum().sqrt()) <= 1 + 1e-3


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: nn.functional.linear(x.bfloat16(), m.w.bfloat16()),
        lambda m, x: nn.functional.linear(x, (m.w @ m.v).to(x.dtype)),
        lambda m, x: nn.functional.linear(x, m.w.half().float()),
    ],
    ids=["cast by hand", "a product under autocast", "cast to and fro"],
)
def test_the_sum_of_many_with_weights_derived_in_fewer_bits(forward: Callable[[Any, Tensor], Tensor]) -> None:
    """Parameters are in float32; what is derived from them is not."""
    numbers, n = Numbers(), 1000
    module = Using(forward, w=numbers(4, 4).float(), v=numbers(4, 4).float())
    x = numbers(n, 4).abs().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x[:1])
        _, part, _ = passed(module, x, torch.ones(n, *output.shape[1:], dtype=output.dtype))
    weights = 1 / part.norms()
    assert_norms_cover_what_is_summed(part, 5)
    whole = part.weighted_sum(weights)
    for left_out in range(5):
        fewer = weights.clone()
        fewer[left_out] = 0
        change = {parameter: total - whole[parameter] for parameter, total in part.weighted_sum(fewer).items()}
        assert float(torch.stack([c.double().square().sum() for c in change.values()]).sum().sqrt()) <= 1 + 1e-3
