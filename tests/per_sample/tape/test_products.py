"""Sums of outer products: norms by the Gram form and by materialising, each forced in turn; the cost model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpdl.per_sample.tape.rules import products
from dpdl.per_sample.tape.rules.products import Arrangement, OuterProducts, SharedGram, gram_is_cheaper
from tests.per_sample.tape.against_autograd import Numbers, Using, check, dtypes, sizes
from tests.per_sample.tape.test_contractions import PRODUCTS

WAYS = {"gram": True, "materialised": False}


def force(monkeypatch: pytest.MonkeyPatch, gram: bool) -> list[tuple[int, ...]]:
    """Take one way to norms wherever there is a choice; the sizes for which there was one."""
    asked: list[tuple[int, ...]] = []

    def choose(sizes: tuple[int, ...], users: int = 1) -> bool:
        asked.append(sizes)
        return gram

    monkeypatch.setattr(products, "gram_is_cheaper", choose)
    return asked


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
