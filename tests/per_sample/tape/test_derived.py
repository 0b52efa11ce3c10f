"""What is derived from parameters alone, and parameters that several operations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as parametrizations
import torch.nn.utils.parametrize as parametrize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.tape import TapeEngine, gradients
from tests.per_sample.tape.against_autograd import (
    Numbers,
    Using,
    check,
    cotangents_of,
    dtypes,
    examples_and_positions,
    sizes,
)

Forward = Callable[[Any, Tensor], Tensor]

# With w [6, 4], b [6], and data [n, t, 4].
VIEWS: dict[str, Forward] = {
    "transposed": lambda m, x: x @ m.w.t(),
    "T": lambda m, x: x @ m.w.T,
    "mT": lambda m, x: x @ m.w.mT,
    "transpose of a slice": lambda m, x: x @ m.w[:3].transpose(0, 1),
    "two halves": lambda m, x: F.linear(x, m.w[:3]) * F.linear(x, m.w[3:]),
    "overlapping slices": lambda m, x: F.linear(x, m.w[:4]) * F.linear(x, m.w[2:]),
    "a slice and the whole": lambda m, x: F.linear(x, m.w) + F.linear(x, m.w[:1]),
    "a slice twice": lambda m, x: F.linear(x, m.w[:3]) * F.linear(x.sin(), m.w[:3]),
    "strided": lambda m, x: F.linear(x, m.w[::2]) * F.linear(x, m.w[1::2]),
    "strided, overlapping": lambda m, x: F.linear(x, m.w[::2]) * F.linear(x, m.w[::3].repeat(2, 1)[:3]),
    "columns": lambda m, x: F.linear(x[..., :2], m.w[:, :2]) + F.linear(x[..., 2:], m.w[:, 2:]),
    "chunk": lambda m, x: sum(F.linear(x, part) for part in m.w.chunk(3)),
    "split": lambda m, x: torch.cat([F.linear(x, part).sin() for part in m.w.split([1, 2, 3])], -1),
    "unbind": lambda m, x: torch.stack([(x * row).sum(-1) for row in m.w.unbind()], -1),
    "heads by view": lambda m, x: torch.einsum("nti,hio->nhto", x, m.w.t().reshape(4, 2, 3).movedim(1, 0)),
    "select and narrow": lambda m, x: F.linear(x, m.w.narrow(0, 1, 3)) * m.w.select(0, 0).sum(),
    "row as a scale": lambda m, x: F.linear(x * m.w[0], m.w[1:]),
    "row as a scale and in the weight": lambda m, x: F.linear(x * m.w[0], m.w),
    "fancy rows": lambda m, x: F.linear(x, m.w[[0, 0, 5]]),
    "masked rows": lambda m, x: F.linear(x, m.w[torch.arange(6) % 2 == 0]),
    "flip": lambda m, x: F.linear(x, m.w.flip(0)) + F.linear(x, m.w),
    "roll": lambda m, x: F.linear(x, m.w.roll(1, 1)),
    "diagonal": lambda m, x: x * m.w.diagonal(),
    "tril": lambda m, x: F.linear(x, m.w.tril()),
    "expand": lambda m, x: torch.bmm(x.transpose(0, 1), m.w.t().expand(x.shape[1], 4, 6)).transpose(0, 1),
    "expanded rows": lambda m, x: F.linear(x, m.w[:1].expand(5, -1)),
    "repeat": lambda m, x: F.linear(x, m.w.repeat(2, 1)),
    "cat of slices": lambda m, x: F.linear(x, torch.cat([m.w[3:], m.w[:3]])),
    "cat with itself": lambda m, x: F.linear(x, torch.cat([m.w, m.w])),
    "cat of two": lambda m, x: F.linear(x, torch.cat([m.w, m.b[:4].unsqueeze(0)])),
    "bias of the weight's column": lambda m, x: F.linear(x, m.w, m.w[:, 0]),
    "a view of a view": lambda m, x: F.linear(x, m.w.view(2, 3, 4)[1].t()[:, :2].t()),
    "unfold": lambda m, x: F.linear(x, m.w.flatten().unfold(0, 4, 2)),
    "as_strided": lambda m, x: F.linear(x, m.w.as_strided((3, 4), (2, 1))),
    "detached beside it": lambda m, x: F.linear(x, m.w) + F.linear(x, m.w.detach()),
    "data of the parameter": lambda m, x: F.linear(x, m.w) * m.w.data[:, 0],
    "no_grad beside it": lambda m, x: F.linear(x, m.w) * _constant(m.w),
}


def _constant(w: Tensor) -> Tensor:
    with torch.no_grad():
        return w.abs().sum(1)


# The same module, with values that are computed.
COMPUTED: dict[str, Forward] = {
    "exp": lambda m, x: F.linear(x, m.w.exp()),
    "product with a constant": lambda m, x: F.linear(x, 0.5 * m.w),
    "negated": lambda m, x: F.linear(x, -m.w, -m.b),
    "sum with its own part": lambda m, x: F.linear(x, m.w + m.w[:1]),
    "weight times bias": lambda m, x: F.linear(x, m.w * m.b.unsqueeze(1), m.b),
    "normalised": lambda m, x: F.linear(x, m.w / m.w.norm(dim=1, keepdim=True)),
    "F.normalize": lambda m, x: F.linear(x, F.normalize(m.w)),
    "standardised": lambda m, x: F.linear(x, (m.w - m.w.mean(1, True)) / m.w.std(1, keepdim=True)),
    "softmax of weights": lambda m, x: F.linear(x, torch.softmax(m.w, 1)),
    "masked": lambda m, x: F.linear(x, m.w * (torch.arange(4) < 3)),
    "gram matrix": lambda m, x: x @ (m.w.t() @ m.w),
    "low rank": lambda m, x: F.linear(x, m.w @ m.a @ m.a.t()),
    "LoRA": lambda m, x: F.linear(x, m.w.detach() + m.u @ m.a.t(), m.b),
    "LoRA, all trained": lambda m, x: F.linear(x, m.w + 0.5 * m.u @ m.a.t(), m.b),
    "LoRA beside": lambda m, x: F.linear(x, m.w, m.b) + F.linear(F.linear(x, m.a.t()), m.u),
    "computed and plain": lambda m, x: F.linear(x, m.w.exp()) * F.linear(x, m.w),
    "computed, used twice": lambda m, x: _twice(m.w.tanh(), x),
    "computed again each time": lambda m, x: F.linear(x, m.w.tanh()) * F.linear(x.sin(), m.w.tanh()),
    "two computed from one": lambda m, x: F.linear(x, m.w.exp()) * F.linear(x, m.w.sin()),
    "scale and bias derived": lambda m, x: F.linear(x, m.w) * m.b.exp() + m.b.tanh(),
    "cumulative sum": lambda m, x: F.linear(x, m.w.cumsum(0)),
    "sorted": lambda m, x: F.linear(x, m.w.sort(0).values),
    "max over a weight": lambda m, x: F.linear(x, m.w - m.w.amax()),
    "in place on a clone": lambda m, x: F.linear(x, m.w.clone().mul_(2)),
    "rows set on a clone": lambda m, x: F.linear(x, _row_set(m)),
    "zeros filled with weights": lambda m, x: F.linear(x, _filled(m)),
    "matrix exponential": lambda m, x: x @ torch.matrix_exp(m.w[:4] - m.w[:4].t()),
    "a scalar of all": lambda m, x: F.linear(x, m.w) / m.w.norm(),
    "binarised, straight through": lambda m, x: F.linear(x, m.w + (m.w.sign() - m.w).detach()),
    "item of a parameter": lambda m, x: F.linear(x, m.w) * float(m.b[0]),
    "branch on a parameter": lambda m, x: F.linear(x, m.w if m.b.sum() > -99 else -m.w),
}


def _twice(w: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, w) * F.linear(x.sin(), w)


def _row_set(m: Any) -> Tensor:
    w = m.w.clone()
    w[0] = m.b[:4]
    return w


def _filled(m: Any) -> Tensor:
    w = torch.zeros(7, 4, dtype=m.w.dtype)
    w[:6] = m.w
    return w


def with_weights(forward: Forward) -> nn.Module:
    numbers = Numbers(3)
    return Using(forward, w=numbers(6, 4), b=numbers(6), a=numbers(4, 2), u=numbers(6, 2))


@pytest.mark.parametrize("name", [*VIEWS, *COMPUTED])
@settings(max_examples=5, deadline=None)
@given(nt=examples_and_positions(), dtype=dtypes)
def test_derived_weights(name: str, nt: tuple[int, int], dtype: torch.dtype) -> None:
    forward = (VIEWS | COMPUTED)[name]
    check(with_weights(forward), Numbers()(*nt, 4), dtype=dtype, fewer_too=False)


PARAMETRISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm, old": lambda layer: nn.utils.weight_norm(layer),
    "weight norm of all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer).eval(),
    "orthogonal": parametrizations.orthogonal,
    "orthogonal, Cayley": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
    "orthogonal, Householder": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"),
}


@pytest.mark.parametrize("name", PARAMETRISED)
@settings(max_examples=5, deadline=None)
@given(nt=examples_and_positions(), i=st.integers(2, 4), o=st.integers(2, 4), dtype=dtypes)
def test_parametrised_linear_layers(name: str, nt: tuple[int, int], i: int, o: int, dtype: torch.dtype) -> None:
    layer = PARAMETRISED[name](nn.Linear(i, o))
    if "old" in name:  # keeps the weight that it computed last, which cannot be copied
        layer = Using(
            lambda m, x: F.linear(x, torch._weight_norm(m.v, m.g, 0), m.b),
            v=Numbers()(o, i), g=Numbers()(o, 1), b=Numbers()(o),
        )  # fmt: skip
    check(layer, Numbers()(*nt, i), dtype=dtype)


@pytest.mark.parametrize("name", ["weight norm", "spectral norm"])
def test_parametrised_convolutions(name: str) -> None:
    for n in (1, 3):
        check(PARAMETRISED[name](nn.Conv2d(2, 4, 3)), Numbers()(n, 2, 4, 5))


def test_a_cached_parametrisation_is_computed_once_and_exact() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(m: Any, x: Tensor) -> Tensor:
        with parametrize.cached():
            return m.layer(torch.tanh(m.layer(x)))

    check(Using(forward, layer=layer), Numbers()(3, 3, 4))


@settings(max_examples=6, deadline=None)
@given(n=sizes, dtype=dtypes)
def test_weight_standardised_convolution(n: int, dtype: torch.dtype) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(m.w, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, m.g * (m.w - mean) * torch.rsqrt(variance + 1e-4), m.b, padding=1)

    numbers = Numbers()
    model = Using(forward, w=numbers(4, 2, 3, 3), g=numbers(4, 1, 1, 1), b=numbers(4))
    check(model, numbers(n, 2, 4, 4), dtype=dtype)


# Modules with l, a linear layer 4 to 4; c, a convolution 4 to 4 of width 1; e, an embedding of 5 in 4.
TIES: dict[str, Forward] = {
    "a layer twice": lambda m, x: m.l(torch.tanh(m.l(x))),
    "a layer thrice": lambda m, x: m.l(torch.tanh(m.l(torch.tanh(m.l(x))))),
    "once with the positions, once without": lambda m, x: m.l(torch.tanh(m.l(x)).mean(1)),
    "layer and product": lambda m, x: torch.tanh(m.l(x)) @ m.l.weight,
    "layer and its transpose": lambda m, x: F.linear(torch.tanh(m.l(x)), m.l.weight.t()),
    "autoencoder": lambda m, x: F.linear(torch.tanh(F.linear(x, m.l.weight[:2])), m.l.weight[:2].t()),
    "linear and convolution": lambda m, x: m.l(x) + F.conv1d(x.mT, m.l.weight.unsqueeze(-1), m.l.bias).mT.sin(),
    "convolution twice": lambda m, x: m.c(torch.tanh(m.c(x.mT))),
    "convolution and linear": lambda m, x: F.linear(m.c(x.mT).mT, m.c.weight.squeeze(-1)),
    "linear and scale": lambda m, x: m.l(x) * m.l.weight[0],
    "bias in two layers": lambda m, x: F.linear(x, m.l.weight, m.l.bias) * F.linear(x, m.c.weight[..., 0], m.l.bias),
    "bias as a scale": lambda m, x: m.l(x) * m.l.bias,
    "weight in a rule and a view": lambda m, x: m.l(x) * F.linear(x, m.l.weight.view(2, 8)[:, :4]).sum(-1, True),
    "rule and vmap": lambda m, x: torch.addcmul(m.l(x), x, m.l.weight[0]),
    "rule, view and computed": lambda m, x: m.l(x) + F.linear(x, m.l.weight.exp()) * m.l.weight[0],
    "einsum and linear": lambda m, x: torch.einsum("nti,oi->nto", torch.tanh(m.l(x)), m.l.weight),
    "different einsums": lambda m, x: (
        torch.einsum("nti,io->nto", x, m.l.weight) * torch.einsum("nti,oi->nto", x, m.l.weight)
    ),
    "norm and scale": lambda m, x: F.layer_norm(x, (4,), m.l.bias, m.l.weight[0]) * m.l.bias,
    "embedding and linear": lambda m, x: F.linear(m.e((x[..., 0] > 0).long()), m.e.weight),
    "embedding and token": lambda m, x: m.e((x[..., 0] > 0).long()) + m.e.weight[1],
    "recurrence": lambda m, x: _recurrence(m, x),
    "token and positions": lambda m, x: torch.cat([m.l.bias.expand(len(x), 1, 4), x + m.l.bias], 1),
    "unequal numbers of rows": lambda m, x: m.l(x).sum(1) * m.l(x[:, 0]),
}


def _recurrence(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        state = torch.tanh(m.l(state) + F.linear(x[:, t], m.c.weight[..., 0]))
    return state


@pytest.mark.parametrize("name", TIES)
@settings(max_examples=6, deadline=None)
@given(nt=examples_and_positions(), dtype=dtypes)
def test_parameters_that_operations_share(name: str, nt: tuple[int, int], dtype: torch.dtype) -> None:
    model = Using(TIES[name], l=nn.Linear(4, 4), c=nn.Conv1d(4, 4, 1), e=nn.Embedding(5, 4))
    check(model, Numbers()(*nt, 4), dtype=dtype, fewer_too=False)


def test_tied_modules_and_parameters_are_one() -> None:
    """One name, one gradient, however many modules hold it."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    true = check(nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), first), Numbers()(4, 4, 4))
    assert set(true.gradients) == {"0.weight", "0.bias", "2.bias"}


@pytest.mark.parametrize("numbers_at_once", [1, 7, 100])
def test_what_is_pulled_back_in_several_parts(numbers_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "NUMBERS_PULLED_BACK", numbers_at_once)
    for name in ("overlapping slices", "exp", "LoRA, all trained", "computed and plain"):
        check(with_weights((VIEWS | COMPUTED)[name]), Numbers()(5, 3, 4))


def test_norms_of_an_arrangement_are_taken_without_pulling_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disjoint views of one parameter: their norms are the parameter's."""
    pulled: list[str] = []
    original = gradients.TapeGradients._rows_behind

    def seen(self: gradients.TapeGradients, parts: Any, index: Tensor) -> dict[str, Tensor]:
        rows = original(self, parts, index)
        pulled.extend(rows)
        return rows

    monkeypatch.setattr(gradients.TapeGradients, "_rows_behind", seen)

    def norms(name: str) -> None:
        pulled.clear()
        model, x = with_weights((VIEWS | COMPUTED)[name]), Numbers()(3, 5, 4)
        forward = TapeEngine(model).forward(ExampleBatch.from_call((x,), {}), dict(model.named_parameters()))
        (part,) = forward.pull_back({0: cotangents_of([tuple(forward.outputs[0].shape)])[0]})
        part.norms()

    for name in ("transposed", "two halves", "strided", "columns", "split", "a view of a view", "exp", "standardised"):
        norms(name)
        assert not pulled, name
    for name in (
        "overlapping slices",
        "a slice and the whole",
        "softmax of weights",
        "row as a scale and in the weight",
    ):
        norms(name)
        assert "w" in pulled, name
