"""Contractions of data with a weight: linear, matrix products on either side, einsum; both ways to their norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpdl.per_sample.tape.rules import products
from dpdl.per_sample.tape.rules.products import Arrangement, OuterProducts, SharedGram, gram_is_cheaper
from tests.per_sample.tape.against_autograd import Numbers, Using, check, dtypes, examples_and_positions, shapes, sizes

WAYS = {"gram": True, "materialised": False}


def force(monkeypatch: pytest.MonkeyPatch, gram: bool) -> list[tuple[int, ...]]:
    """Take one way to norms wherever there is a choice; the sizes for which there was one."""
    asked: list[tuple[int, ...]] = []

    def choose(sizes: tuple[int, ...], users: int = 1) -> bool:
        asked.append(sizes)
        return gram

    monkeypatch.setattr(products, "gram_is_cheaper", choose)
    return asked


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
    "baddbmm, beta 0": (
        lambda m, x: (x[..., :1] * torch.nan).baddbmm(x, m.w.expand(len(x), -1, -1), beta=0),
        lambda n, t, i, o: (n, t, i),
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


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=12, deadline=None)
@given(n=sizes, t=st.integers(2, 5), i=sizes, o=sizes, dtype=dtypes)
def test_either_way_to_norms_of_a_linear_layer(way: str, n: int, t: int, i: int, o: int, dtype: torch.dtype) -> None:
    with pytest.MonkeyPatch.context() as patch:
        asked = force(patch, WAYS[way])
        check(nn.Linear(i, o), Numbers()(n, t, i), dtype=dtype)
    assert asked[0] == (n, 1, t, i, o)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["batch of weights", "batch of weights, first", "w @ x", "matmul of four axes"])
@settings(max_examples=5, deadline=None)
@given(n=sizes, t=st.integers(2, 4), i=st.integers(2, 4), o=st.integers(2, 4), dtype=dtypes)
def test_either_way_to_norms_of_products(
    way: str, name: str, n: int, t: int, i: int, o: int, dtype: torch.dtype
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        asked = force(patch, WAYS[way])
        forward, data, weight = PRODUCTS[name]
        numbers = Numbers()
        check(Using(forward, w=numbers(*weight(t, i, o))), numbers(*data(n, t, i, o)), dtype=dtype)
    assert asked


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=10, deadline=None)
@given(n=sizes, t=st.integers(2, 5), i=sizes, dtype=dtypes)
def test_either_way_when_a_layer_is_used_twice(way: str, n: int, t: int, i: int, dtype: torch.dtype) -> None:
    """Its two uses are joined along positions: the cross term is in the norm."""
    layer = nn.Linear(i, i)
    with pytest.MonkeyPatch.context() as patch:
        force(patch, WAYS[way])
        check(Using(lambda m, x: m.layer(torch.tanh(m.layer(x))), layer=layer), Numbers()(n, t, i), dtype=dtype)
        once = Using(lambda m, x: m.layer(torch.tanh(m.layer(x[:, 0]))), layer=layer)  # two positions only when joined
        check(once, Numbers()(n, t, i), dtype=dtype)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=10, deadline=None)
@given(n=sizes, s=sizes, t=st.integers(1, 4), i=sizes, o=sizes, dtype=dtypes)
def test_outer_products_answer_as_their_definition(
    way: str, n: int, s: int, t: int, i: int, o: int, dtype: torch.dtype
) -> None:
    """G[n, s, o, i] = sum_t g[n, s, t, o] a[n, s, t, i], in each of its answers and in any order of asking."""
    numbers = Numbers()
    a, g = numbers(n, s, t, i).to(dtype), numbers(n, s, t, o).to(dtype)
    arrangement = Arrangement(shape=(s, o, i), order=(2, 0, 1))
    true = torch.einsum("nsti,nsto->niso", a.double(), g.double())
    weights = torch.linspace(0, 1, n, dtype=torch.float64)
    total = torch.einsum("n,niso->iso", weights, true)
    index = torch.tensor([n - 1, 0])
    tolerance: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 0}
    tolerance["check_dtype"] = False

    def squares(rows: Tensor) -> Tensor:
        return rows.flatten(1).square().sum(1)

    with pytest.MonkeyPatch.context() as patch:
        force(patch, WAYS[way])
        for asked in ("norms", "sum", "both"):
            part = OuterProducts(a.clone(), g.clone(), arrangement)
            if asked != "sum":
                torch.testing.assert_close(part.norms_squared(), squares(true), **tolerance)
            if asked != "norms":
                torch.testing.assert_close(part.weighted_sum(weights), total, **tolerance)
            torch.testing.assert_close(part.materialize(), true, **tolerance)
            few = part.rows(index)
            torch.testing.assert_close(few.norms_squared(), squares(true[index]), **tolerance)
            torch.testing.assert_close(
                few.weighted_sum(weights[index]),
                total * 0 + weights[n - 1] * true[n - 1] + weights[0] * true[0],
                **tolerance,
            )
            assert few.double().materialize().dtype == torch.float64
            torch.testing.assert_close(part.double().materialize(), true, **tolerance)


@settings(max_examples=15, deadline=None)
@given(n=sizes, t=st.integers(2, 5), widths=st.lists(sizes, min_size=2, max_size=3), o=sizes, dtype=dtypes)
def test_a_gram_matrix_shared_by_several_weights(n: int, t: int, widths: list[int], o: int, dtype: torch.dtype) -> None:
    numbers = Numbers()
    g = numbers(n, 1, t, o).to(dtype)
    shared = SharedGram(len(widths))
    with pytest.MonkeyPatch.context() as patch:
        force(patch, True)
        for width in widths:
            a = numbers(n, 1, t, width).to(dtype)
            part = OuterProducts(a, g, Arrangement(shape=(o, width), order=(0, 1)), shared=shared)
            true = torch.einsum("nsti,nsto->noi", a.double(), g.double()).flatten(1).norm(dim=1)
            found = part.norms_squared().double().sqrt()
            torch.testing.assert_close(found, true, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-12)
    assert shared.of(g) is shared.of(g)


def test_norms_where_an_examples_positions_cancel_are_not_below_the_truth() -> None:
    """a and -a: the Gram form is a difference of large numbers."""
    numbers = Numbers()
    a = numbers(50, 1, 8, 16).float()
    g = numbers(50, 1, 8, 16).float()
    a, g = torch.cat([a, a], 2), torch.cat([g, -g * (1 + 1e-4)], 2)
    true = torch.einsum("nsti,nsto->noi", a.double(), g.double()).flatten(1).norm(dim=1)
    with pytest.MonkeyPatch.context() as patch:
        force(patch, True)
        found = OuterProducts(a, g, Arrangement(shape=(16, 16), order=(0, 1))).norms_squared().double().sqrt()
    assert (found >= true).all()
    assert (found <= 100 * true).all()


def test_the_cost_model_prefers_what_is_smaller() -> None:
    assert gram_is_cheaper((8, 1, 2, 1000, 1000))  # two positions beside a million weights
    assert not gram_is_cheaper((8, 1, 4096, 16, 16))  # a large image, few channels
    wide = [gram_is_cheaper((8, 1, t, 512, 512)) for t in (2, 16, 128, 1024, 8192)]
    assert wide == sorted(wide, reverse=True)  # once materialising is cheaper it stays so as positions grow
    assert wide[0]
    assert not wide[-1]
    by_width = [gram_is_cheaper((8, 1, 64, width, width)) for width in (2, 16, 128, 1024)]
    assert by_width == sorted(by_width)
    for sizes_of in [(4, 1, t, i, 256) for t in (8, 64, 256) for i in (16, 256)]:
        assert gram_is_cheaper(sizes_of, 2) or not gram_is_cheaper(sizes_of)  # sharing never makes Gram dearer


def test_operands_are_let_go_where_gradients_are_materialised_and_kept_where_not() -> None:
    numbers = Numbers()
    for gram in (True, False):
        part = OuterProducts(numbers(2, 1, 3, 4), numbers(2, 1, 3, 5), Arrangement(shape=(5, 4), order=(0, 1)))
        with pytest.MonkeyPatch.context() as patch:
            force(patch, gram)
            part.norms_squared()
        assert (part.a is None) is (part.g is None) is (not gram)


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
