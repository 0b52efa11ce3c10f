"""Contractions of data with a weight: linear, matrix products on either side, einsum; both ways to their norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpdl.per_sample.tape.rules.products import OuterProducts
from tests.per_sample.tape.against_autograd import Numbers, Using, check, dtypes, examples_and_positions, shapes, sizes


@settings(max_examples=30, deadline=None)
@given(examples_and_positions(), shapes(most=2), sizes, sizes, st.booleans(), dtypes)
def test_linear_with_any_leading_axes(
    nt: tuple[int, int], lead: tuple[int, ...], i: int, o: int, bias: bool, dtype: torch.dtype
) -> None:
    n, t = nt
    check(nn.Linear(i, o, bias=bias), Numbers()(n, *lead[:1], t, *lead[1:], i), dtype=dtype)
    check(nn.Linear(i, o, bias=bias), Numbers()(n, i), dtype=dtype)


@settings(max_examples=20, deadline=None)
@given(examples_and_positions(), sizes, sizes, st.integers(1, 2), dtypes)
def test_linear_with_the_examples_on_a_later_axis(
    nt: tuple[int, int], i: int, o: int, position: int, dtype: torch.dtype
) -> None:
    n, t = nt

    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(m.layer(x.movedim(0, position))).movedim(position, 0)

    check(Using(forward, layer=nn.Linear(i, o)), Numbers()(n, t, 2, i), dtype=dtype)
    if t > 1:

        def two_layers(m: Any, x: Tensor) -> Tensor:
            return m.second(torch.tanh(m.first(x.movedim(0, position)))).movedim(position, 0)

        check(Using(two_layers, first=nn.Linear(i, o), second=nn.Linear(o, 2)), Numbers()(n, t, 2, i), dtype=dtype)


@settings(max_examples=15, deadline=None)
@given(examples_and_positions(), sizes, sizes, dtypes)
def test_linear_with_one_of_its_tensors_frozen(nt: tuple[int, int], i: int, o: int, dtype: torch.dtype) -> None:
    for frozen in ("weight", "bias"):
        layer = nn.Linear(i, o)
        layer.get_parameter(frozen).requires_grad_(False)
        true = check(layer, Numbers()(*nt, i), dtype=dtype)
        assert set(true.gradients) == {"weight", "bias"} - {frozen}


PRODUCTS: dict[str, tuple[Any, Any, Any]] = {
    # name: (forward, shape of the data from (n, t, i, o), shape of the weight from (t, i, o))
    "x @ w": (lambda m, x: x @ m.w, lambda n, t, i, o: (n, t, i), lambda t, i, o: (i, o)),
    "x @ w of two axes": (lambda m, x: x @ m.w, lambda n, t, i, o: (n, i), lambda t, i, o: (i, o)),
    "matmul of four axes": (lambda m, x: torch.matmul(x, m.w), lambda n, t, i, o: (n, 2, t, i), lambda t, i, o: (i, o)),
    "x.matmul": (lambda m, x: x.matmul(m.w), lambda n, t, i, o: (n, t, i), lambda t, i, o: (i, o)),
    "w @ x": (lambda m, x: m.w @ x, lambda n, t, i, o: (n, i, t), lambda t, i, o: (o, i)),
    "w @ x of four axes": (lambda m, x: m.w @ x, lambda n, t, i, o: (n, 3, i, t), lambda t, i, o: (o, i)),
    "w.matmul(x)": (lambda m, x: m.w.matmul(x), lambda n, t, i, o: (n, i, t), lambda t, i, o: (o, i)),
    "w @ x.t()": (lambda m, x: (m.w @ x.t()).t(), lambda n, t, i, o: (n, i), lambda t, i, o: (o, i)),
    "mm": (lambda m, x: torch.mm(x, m.w), lambda n, t, i, o: (n, i), lambda t, i, o: (i, o)),
    "mm, weight first": (lambda m, x: m.w.mm(x.t()).t(), lambda n, t, i, o: (n, i), lambda t, i, o: (o, i)),
    "batch of weights": (lambda m, x: x @ m.w, lambda n, t, i, o: (n, 3, t, i), lambda t, i, o: (3, i, o)),
    "batch of weights, first": (lambda m, x: m.w @ x, lambda n, t, i, o: (n, 3, i, t), lambda t, i, o: (3, o, i)),
    "two axes of weights": (lambda m, x: x @ m.w, lambda n, t, i, o: (n, 2, 3, t, i), lambda t, i, o: (2, 3, i, o)),
    "weights with a broadcast axis": (
        lambda m, x: x @ m.w,
        lambda n, t, i, o: (n, 2, 3, t, i),
        lambda t, i, o: (2, 1, i, o),
    ),
    "weights with an axis of one": (lambda m, x: x @ m.w, lambda n, t, i, o: (n, t, i), lambda t, i, o: (1, i, o)),
    "data with an axis of one": (lambda m, x: x @ m.w, lambda n, t, i, o: (n, 1, t, i), lambda t, i, o: (3, i, o)),
    "data with fewer axes": (
        lambda m, x: (x @ m.w).movedim(-2, 0),
        lambda n, t, i, o: (n, i),
        lambda t, i, o: (t, i, o),
    ),
    "bmm over positions": (
        lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1),
        lambda n, t, i, o: (n, t, i),
        lambda t, i, o: (t, i, o),
    ),
    "bmm over positions, weight first": (
        lambda m, x: m.w.bmm(x.permute(1, 2, 0)).permute(2, 0, 1),
        lambda n, t, i, o: (n, t, i),
        lambda t, i, o: (t, o, i),
    ),
    "matmul with a vector": (lambda m, x: x @ m.w, lambda n, t, i, o: (n, t, i), lambda t, i, o: (i,)),
    "vector of two axes": (lambda m, x: x @ m.w, lambda n, t, i, o: (n, i), lambda t, i, o: (i,)),
    "vector first": (lambda m, x: m.w @ x, lambda n, t, i, o: (n, i, t), lambda t, i, o: (i,)),
    "mv": (lambda m, x: torch.mv(x, m.w), lambda n, t, i, o: (n, i), lambda t, i, o: (i,)),
    "outer product": (lambda m, x: torch.outer(x[:, 0], m.w), lambda n, t, i, o: (n, i), lambda t, i, o: (o,)),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, 1), lambda n, t, i, o: (n, t, i), lambda t, i, o: (i, o)),
    "addmm": (
        lambda m, x: torch.addmm(x[:, :1], x, m.w, beta=0.5, alpha=-2.0),
        lambda n, t, i, o: (n, i),
        lambda t, i, o: (i, o),
    ),
    "baddbmm": (
        lambda m, x: torch.baddbmm(x.transpose(0, 1)[..., :1], x.transpose(0, 1), m.w, beta=3, alpha=0.25).transpose(
            0, 1
        ),
        lambda n, t, i, o: (n, t, i),
        lambda t, i, o: (t, i, o),
    ),
    "addmm, beta 0": (  # what is added is not even read
        lambda m, x: torch.addmm(x[:, :1] * torch.nan, x, m.w, beta=0),
        lambda n, t, i, o: (n, i),
        lambda t, i, o: (i, o),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
@settings(max_examples=6, deadline=None)
@given(nt=examples_and_positions(), i=sizes, o=sizes, dtype=dtypes)
def test_products(name: str, nt: tuple[int, int], i: int, o: int, dtype: torch.dtype) -> None:
    forward, data, weight = PRODUCTS[name]
    numbers = Numbers()
    check(Using(forward, w=numbers(*weight(nt[1], i, o))), numbers(*data(*nt, i, o)), dtype=dtype)


@settings(max_examples=15, deadline=None)
@given(examples_and_positions(), sizes, sizes, dtypes, st.sampled_from([0.0, 1.0, -0.5]), st.sampled_from([1.0, 3.0]))
def test_products_with_a_learned_addend(
    nt: tuple[int, int], i: int, o: int, dtype: torch.dtype, beta: float, alpha: float
) -> None:
    n, t = nt
    numbers = Numbers()
    added = Using(lambda m, x: torch.addmm(m.b, x, m.w, beta=beta, alpha=alpha), w=numbers(i, o), b=numbers(o))
    check(added, numbers(n, i), dtype=dtype)
    batched = Using(
        lambda m, x: m.b.baddbmm(x.transpose(0, 1), m.w, beta=beta, alpha=alpha).transpose(0, 1),
        w=numbers(t, i, o),
        b=numbers(t, 1, o),
    )
    check(batched, numbers(n, t, i), dtype=dtype)


EINSUMS: dict[str, tuple[str, str]] = {
    # equation: axes of the data, axes of the weight; b is the examples'
    "bti,io->bto": ("bti", "io"),
    "io,bti->bto": ("bti", "io"),
    "bti,tio->bto": ("bti", "tio"),  # a shared letter
    "bhti,hio->bhto": ("bhti", "hio"),
    "bthi,hio->bto": ("bthi", "hio"),  # heads summed
    "bti,oi->bot": ("bti", "oi"),
    "tbi,io->tbo": ("tbi", "io"),
    "bti,ti->b": ("bti", "ti"),
    "bti,i->bt": ("bti", "i"),
    "bi,o->bio": ("bi", "o"),  # an outer product
    "bti,tio->bo": ("bti", "tio"),
    "...i,io->...o": ("bti", "io"),
    "b...i,...io->b...o": ("bthi", "thio"),
    "b...i,...io->bo...": ("bthi", "hio"),  # broadcast within the ellipsis
    "bti,io": ("bti", "io"),  # the output's letters in the order of the alphabet
    "bti,ito->bo": ("bti", "ito"),
    "bti,io->bt": ("bti", "io"),  # a letter of the weight alone, summed
    "bti,io->bo": ("bti", "io"),  # a letter of the data alone, summed
    "btt,to->bto": ("btt", "to"),
    "bti,ii->bti": ("bti", "ii"),
    " b t i , i o -> b t o": ("bti", "io"),
}


@pytest.mark.parametrize("equation", EINSUMS)
@settings(max_examples=6, deadline=None)
@given(nt=examples_and_positions(), i=sizes, o=sizes, dtype=dtypes)
def test_einsum(equation: str, nt: tuple[int, int], i: int, o: int, dtype: torch.dtype) -> None:
    numbers, size = Numbers(), {"b": nt[0], "t": nt[1], "i": i, "o": o, "h": 2}
    data, weight = EINSUMS[equation]
    place = data.index("b")

    def forward(m: Any, x: Tensor) -> Tensor:
        operands = (m.w, x.movedim(0, place)) if equation.startswith("io") else (x.movedim(0, place), m.w)
        return torch.einsum(equation, *operands).movedim(place, 0)

    x = numbers(*(size[c] for c in data)).movedim(place, 0)
    check(Using(forward, w=numbers(*(size[c] for c in weight))), x, dtype=dtype)


@settings(max_examples=10, deadline=None)
@given(nt=examples_and_positions(), i=sizes, o=sizes, dtype=dtypes)
def test_einsum_of_three_operands(nt: tuple[int, int], i: int, o: int, dtype: torch.dtype) -> None:
    numbers = Numbers()
    model = Using(lambda m, x: torch.einsum("bti,io,t->bo", x, m.w, m.v), w=numbers(i, o), v=numbers(nt[1]))
    check(model, numbers(*nt, i), dtype=dtype)
    bilinear = Using(lambda m, x, y: torch.einsum("bi,oij,bj->bo", x, m.w, y), w=numbers(o, i, 3))
    check(bilinear, numbers(nt[0], i), numbers(nt[0], 3), dtype=dtype)


def test_rules_are_reached_and_not_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every contraction that a letter of the equation describes is one of outer products, not a copy for each."""
    made: list[tuple[int, ...]] = []
    original = OuterProducts.__init__

    def counted(self: OuterProducts, a: Tensor, g: Tensor, *args: Any, **kwargs: Any) -> None:
        made.append(tuple(a.shape))
        original(self, a, g, *args, **kwargs)

    monkeypatch.setattr(OuterProducts, "__init__", counted)
    numbers = Numbers()
    by_rule = [
        (nn.Linear(3, 2), (4, 5, 3)),
        (Using(lambda m, x: F.linear(x, m.w), w=numbers(2, 3)), (4, 3)),
        *(
            (Using(PRODUCTS[name][0], w=numbers(*PRODUCTS[name][2](5, 3, 2))), PRODUCTS[name][1](4, 5, 3, 2))
            for name in ("x @ w", "w @ x", "mm", "bmm over positions", "batch of weights", "two axes of weights")
        ),
        (Using(lambda m, x: torch.einsum("bti,hio->bhto", x, m.w), w=numbers(2, 3, 2)), (4, 5, 3)),
    ]
    for model, shape in by_rule:
        made.clear()
        check(model, numbers(*shape), fewer_too=False)
        assert made, model


KEYWORDS: dict[str, Any] = {
    "matmul": lambda m, x: torch.matmul(x, other=m.w),
    "matmul, all named": lambda m, x: torch.matmul(input=x, other=m.w),
    "mm": lambda m, x: torch.mm(x[:, 0], mat2=m.w),
    "bmm": lambda m, x: torch.bmm(x.transpose(0, 1), mat2=m.w.expand(x.shape[1], -1, -1)).transpose(0, 1),
    "addmm": lambda m, x: torch.addmm(input=m.b, mat1=x[:, 0], mat2=m.w, beta=2),
    "baddbmm": lambda m, x: torch.baddbmm(
        x.transpose(0, 1), batch1=x.transpose(0, 1), batch2=m.w.expand(x.shape[1], -1, -1)
    ).transpose(0, 1),
    "linear": lambda m, x: F.linear(input=x, weight=m.w, bias=m.b),
    "add": lambda m, x: torch.add(input=m.b, other=x, alpha=2),
    "sub": lambda m, x: torch.sub(x, other=m.b, alpha=2),
    "mul": lambda m, x: torch.mul(x, other=m.b),
    "add_": lambda m, x: x.clone().add_(other=m.b),
    "layer_norm": lambda m, x: torch.layer_norm(input=x, normalized_shape=[4], weight=m.b, bias=m.b),
    "index_select": lambda m, x: torch.index_select(input=m.w, dim=0, index=(x[:, 0, 0] > 0).long()),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_arguments_by_keyword(name: str) -> None:
    numbers = Numbers()
    for n in (1, 3):
        check(Using(KEYWORDS[name], w=numbers(4, 4), b=numbers(4)), numbers(n, 3, 4))


def test_no_positions_at_all() -> None:
    """Sequences of length 0 leave zeros."""
    numbers = Numbers()
    for forward in (
        lambda m, x: F.linear(x, m.w, m.b),
        lambda m, x: x @ m.w,
        lambda m, x: torch.einsum("nti,io->nto", x, m.w),
        lambda m, x: x * m.b + m.b,
        lambda m, x: F.layer_norm(x, (4,), m.b, m.b),
    ):
        with_bias = Using(
            lambda m, x, forward=forward: m.c + forward(m, x).sum(1), w=numbers(4, 4), b=numbers(4), c=numbers(4)
        )
        check(with_bias, numbers(3, 0, 4))
