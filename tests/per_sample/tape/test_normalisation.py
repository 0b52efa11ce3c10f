"""Normalisations with a learned scale and shift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpdl.per_sample.tape.contribution import Materialized
from tests.per_sample.tape.against_autograd import (
    Numbers,
    Using,
    check,
    dtypes,
    examples_and_positions,
    shapes,
    sizes,
)

LEARNED = ["both", "weight", "bias", "weight frozen", "bias frozen"]


def learned(layer: nn.Module, which: str) -> nn.Module:
    """A normalisation with weights at no special value, some of them absent or frozen."""
    numbers = Numbers(7)
    for name in ("weight", "bias"):
        parameter = getattr(layer, name, None)
        if parameter is None:
            continue
        parameter.data = 1 + 0.5 * numbers(*parameter.shape)
        if which == f"{name} frozen":
            parameter.requires_grad_(False)
        elif which in ("weight", "bias") and which != name:
            setattr(layer, name, None)
    return layer


def rows(*shape: int, seed: int = 0) -> Tensor:
    return 2 * Numbers(seed)(*shape) + 1


@pytest.mark.parametrize("which", LEARNED)
@settings(max_examples=12, deadline=None)
@given(nt=examples_and_positions(), more=shapes(most=1), normalised=shapes(least=1, most=2), dtype=dtypes)
def test_layer_norm(
    which: str, nt: tuple[int, int], more: tuple[int, ...], normalised: tuple[int, ...], dtype: torch.dtype
) -> None:
    normalised = (*normalised[:-1], normalised[-1] + 1)  # of one number, all is zero
    layer = learned(nn.LayerNorm(normalised), which)
    check(layer, rows(*nt, *more, *normalised), dtype=dtype)
    check(layer, rows(nt[0], *normalised), dtype=dtype)


@settings(max_examples=10, deadline=None)
@given(nt=examples_and_positions(), d=st.integers(2, 4), dtype=dtypes)
def test_layer_norm_with_the_examples_second(nt: tuple[int, int], d: int, dtype: torch.dtype) -> None:
    layer = learned(nn.LayerNorm(d), "both")
    check(Using(lambda m, x: m.norm(x.transpose(0, 1)).transpose(0, 1), norm=layer), rows(*nt, d), dtype=dtype)


@pytest.mark.parametrize("which", [which for which in LEARNED if which != "bias"])  # torch itself fails on a bias alone
@settings(max_examples=8, deadline=None)
@given(n=sizes, groups=st.integers(1, 3), each=st.integers(1, 2), more=shapes(most=3), dtype=dtypes)
def test_group_norm(which: str, n: int, groups: int, each: int, more: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = learned(nn.GroupNorm(groups, groups * each), which)
    check(layer, rows(n, groups * each, *more, 2), dtype=dtype)  # a group of one number would be constant


@settings(max_examples=6, deadline=None)
@given(n=sizes, dtype=dtypes)
def test_group_norm_of_rows(n: int, dtype: torch.dtype) -> None:
    check(learned(nn.GroupNorm(2, 6), "both"), rows(n, 6), dtype=dtype)


@pytest.mark.parametrize("which", LEARNED)
@settings(max_examples=6, deadline=None)
@given(n=sizes, c=sizes, dimensions=st.integers(1, 3), dtype=dtypes)
def test_instance_norm(which: str, n: int, c: int, dimensions: int, dtype: torch.dtype) -> None:
    layer = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d][dimensions - 1](c, affine=True)
    check(learned(layer, which), rows(n, c, *(3, 2, 2)[:dimensions]), dtype=dtype)


@settings(max_examples=10, deadline=None)
@given(nt=examples_and_positions(), normalised=shapes(least=1, most=2), dtype=dtypes)
def test_rms_norm(nt: tuple[int, int], normalised: tuple[int, ...], dtype: torch.dtype) -> None:
    normalised = (*normalised[:-1], normalised[-1] + 1)
    check(learned(nn.RMSNorm(normalised), "both"), rows(*nt, *normalised), dtype=dtype)
    check(learned(nn.RMSNorm(normalised, eps=1e-3), "both"), rows(*nt, *normalised), dtype=dtype)


@pytest.mark.parametrize("which", LEARNED)
@settings(max_examples=6, deadline=None)
@given(n=sizes, c=sizes, dimensions=st.integers(0, 3), dtype=dtypes)
def test_batch_norm_by_running_statistics(which: str, n: int, c: int, dimensions: int, dtype: torch.dtype) -> None:
    layer = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dimensions](c).double().eval()
    layer.running_mean.copy_(rows(c, seed=1))
    layer.running_var.copy_(rows(c, seed=2).square() + 0.1)
    check(learned(layer, which), rows(n, c, *(3, 2, 2)[:dimensions]), dtype=dtype)


@settings(max_examples=6, deadline=None)
@given(n=sizes, c=sizes, dtype=dtypes)
def test_instance_norm_by_running_statistics(n: int, c: int, dtype: torch.dtype) -> None:
    layer = nn.InstanceNorm2d(c, affine=True, track_running_stats=True).double().eval()
    layer.running_mean.copy_(rows(c, seed=1))
    layer.running_var.copy_(rows(c, seed=2).square() + 0.1)
    check(learned(layer, "both"), rows(n, c, 3, 2), dtype=dtype)


WRITTEN_OUT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "RMS": lambda m, x: m.w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)),
    "layer": lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 0.1) * m.w + m.b,
    "global response": lambda m, x: (
        m.w * (x * (x.norm(dim=1, keepdim=True) / (x.norm(dim=1, keepdim=True).mean(-1, keepdim=True) + 1e-6)))
        + m.b
        + x
    ),
    "one more than the weight": lambda m, x: F.layer_norm(x, x.shape[-1:]) * (1 + m.w) + m.b,
    "functional, derived weight": lambda m, x: F.layer_norm(x, x.shape[-1:], m.w.exp(), 2 * m.b),
    "channels moved": lambda m, x: F.layer_norm(x.mT.contiguous().mT, x.shape[-1:], m.w, m.b),
    "weight from the bias": lambda m, x: F.layer_norm(x, x.shape[-1:], m.b, m.b),
    "twice": lambda m, x: F.layer_norm(F.layer_norm(x, x.shape[-1:], m.w, m.b).sin(), x.shape[-1:], m.w, m.b),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
@settings(max_examples=6, deadline=None)
@given(nt=examples_and_positions(), d=st.integers(2, 4), dtype=dtypes)
def test_normalisations_as_models_write_them(name: str, nt: tuple[int, int], d: int, dtype: torch.dtype) -> None:
    numbers = Numbers()
    check(Using(WRITTEN_OUT[name], w=numbers(d), b=numbers(d)), rows(*nt, d), dtype=dtype)


@settings(max_examples=6, deadline=None)
@given(n=sizes, k=st.integers(1, 3), dtype=dtypes)
def test_several_rows_of_an_example(n: int, k: int, dtype: torch.dtype) -> None:
    """Windows: [N * k, c, ...] for norms that take the batch first."""

    def windows(m: Any, x: Tensor) -> Tensor:
        return m.norm(x.flatten(0, 1)).unflatten(0, (len(x), -1))

    for norm, shape in (
        (nn.GroupNorm(2, 4), (4, 3)),
        (nn.LayerNorm((4, 3)), (4, 3)),
        (nn.InstanceNorm1d(4, affine=True), (4, 3)),
        (nn.BatchNorm1d(4).eval(), (4, 3)),
    ):
        check(Using(windows, norm=learned(norm, "both")), rows(n, k, *shape), dtype=dtype)


def test_an_in_place_activation_may_follow() -> None:
    for norm in (nn.LayerNorm(4), nn.GroupNorm(1, 3), nn.RMSNorm(4)):
        check(nn.Sequential(nn.Linear(4, 4), learned(norm, "both"), nn.ReLU(inplace=True)), rows(3, 3, 4))


def test_both_are_contributions_of_the_scales_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rule: a normalised input is multiplied by the gradient, and summed."""
    made: list[tuple[int, ...]] = []
    original = Materialized.__init__
    monkeypatch.setattr(
        Materialized,
        "__init__",
        lambda self, gradients: (made.append(tuple(gradients.shape)), original(self, gradients))[1],
    )
    check(learned(nn.LayerNorm(4), "both"), rows(3, 5, 4), fewer_too=False)
    assert made[:2] == [(3, 4), (3, 4)]
