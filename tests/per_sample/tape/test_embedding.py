"""Tables looked up: gradients as rows that were asked for, and never a table for each example."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.tape import TapeEngine
from dpdl.per_sample.tape.rules.embedding import Lookups, Tied
from dpdl.per_sample.tape.rules.products import Arrangement, OuterProducts
from tests.per_sample.tape.against_autograd import (
    Numbers,
    Using,
    check,
    cotangents_of,
    dtypes,
    exact_or_refused,
    examples_and_positions,
    shapes,
    sizes,
    weights_of,
)


@settings(max_examples=30, deadline=None)
@given(n=sizes, positions=shapes(most=2), v=st.integers(1, 6), d=sizes, seed=st.integers(0, 99), dtype=dtypes)
def test_embedding(n: int, positions: tuple[int, ...], v: int, d: int, seed: int, dtype: torch.dtype) -> None:
    """Tables smaller than what is looked up, so that tokens repeat."""
    tokens = Numbers(seed).tokens(n, *positions, vocabulary=v)
    check(nn.Embedding(v, d), tokens, dtype=dtype)
    check(nn.Embedding(v, d), tokens.int(), dtype=dtype)


@settings(max_examples=20, deadline=None)
@given(nt=examples_and_positions(), v=st.integers(1, 5), d=sizes, padding=st.integers(-5, 4), dtype=dtypes)
def test_embedding_padding_receives_nothing(
    nt: tuple[int, int], v: int, d: int, padding: int, dtype: torch.dtype
) -> None:
    padding = padding % v
    layer = nn.Embedding(v, d, padding_idx=padding)
    true = check(layer, Numbers().tokens(*nt, vocabulary=v), dtype=dtype)
    assert not true.gradients["weight"][:, padding].any()
    negative = Using(lambda m, x: F.embedding(x, m.w, padding_idx=padding - v), w=Numbers()(v, d))
    check(negative, Numbers().tokens(*nt, vocabulary=v), dtype=dtype)


LOOKED_UP: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "index_select": lambda m, x: torch.index_select(m.w, 0, x.flatten()).view(*x.shape, -1),
    "w.index_select": lambda m, x: m.w.index_select(0, x.flatten()).view(*x.shape, -1),
    "w[x]": lambda m, x: m.w[x],
    "w[x - 5], negative": lambda m, x: m.w[x - len(m.w)],
    "w[x, :]": lambda m, x: m.w[x, :],
    "w[:, x]": lambda m, x: m.w[:, x % m.w.shape[1]].movedim(0, -1),
    "w.t()[x]": lambda m, x: m.w.t()[x % m.w.shape[1]],
    "index_select of columns": lambda m, x: m.w.index_select(1, x.flatten() % m.w.shape[1]).t().reshape(*x.shape, -1),
    "F.embedding of a product": lambda m, x: F.embedding(x, 2.0 * m.w),
    "one hot": lambda m, x: F.one_hot(x, len(m.w)).to(m.w.dtype) @ m.w,
    "gather": lambda m, x: m.w[:, 0].expand(len(x), -1).gather(1, x),
    "take": lambda m, x: torch.take(m.w, x),
}


@pytest.mark.parametrize("name", LOOKED_UP)
@settings(max_examples=8, deadline=None)
@given(nt=examples_and_positions(), v=st.integers(1, 5), d=sizes, dtype=dtypes)
def test_other_ways_to_look_up(name: str, nt: tuple[int, int], v: int, d: int, dtype: torch.dtype) -> None:
    numbers = Numbers()
    check(Using(LOOKED_UP[name], w=numbers(v, d)), numbers.tokens(*nt, vocabulary=v), dtype=dtype)


@settings(max_examples=10, deadline=None)
@given(nt=examples_and_positions(), v=st.integers(1, 5), dtype=dtypes)
def test_tables_of_one_and_of_three_axes(nt: tuple[int, int], v: int, dtype: torch.dtype) -> None:
    """A bias for each pair of positions, say, is a vector or a cube that is indexed."""
    numbers = Numbers()
    for rows in ((v,), (v, 2, 3)):
        check(Using(lambda m, x: m.w[x], w=numbers(*rows)), numbers.tokens(*nt, vocabulary=v), dtype=dtype)


def test_rows_by_a_mask_of_the_data_are_exact_or_refused() -> None:
    model = Using(lambda m, x: torch.where(x[..., None] > 0, m.w[(x > 0).long()], 0.5 * m.w[0]), w=Numbers()(2, 3))
    check(model, Numbers()(4, 4))


@settings(max_examples=10, deadline=None)
@given(nt=examples_and_positions(), v=st.integers(2, 5), dtype=dtypes)
def test_a_table_looked_up_several_times(nt: tuple[int, int], v: int, dtype: torch.dtype) -> None:
    """Lookups of one row by different calls meet in the norm."""
    numbers = Numbers()
    model = Using(lambda m, x: m.e(x) * m.e(x.flip(-1)) + m.e.weight[x[:, :1]], e=nn.Embedding(v, 3))
    check(model, numbers.tokens(*nt, vocabulary=v), dtype=dtype)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padded", [False, True])
@settings(max_examples=8, deadline=None)
@given(nt=examples_and_positions(), v=st.integers(2, 5), d=sizes, dtype=dtypes)
def test_embedding_bag(mode: str, padded: bool, nt: tuple[int, int], v: int, d: int, dtype: torch.dtype) -> None:
    layer = nn.EmbeddingBag(v, d, mode=mode, padding_idx=v - 1 if padded else None)
    tokens = Numbers().tokens(*nt, vocabulary=v)
    check(layer, tokens, dtype=dtype)
    tokens[0] = v - 1  # a bag of nothing but padding
    check(layer, tokens, dtype=dtype)


@settings(max_examples=10, deadline=None)
@given(nt=examples_and_positions(), v=st.integers(1, 5), d=sizes, dtype=dtypes)
def test_embedding_bag_with_weights(nt: tuple[int, int], v: int, d: int, dtype: torch.dtype) -> None:
    numbers = Numbers()
    model = Using(lambda m, x, w: m.bag(x, per_sample_weights=w), bag=nn.EmbeddingBag(v, d, mode="sum"))
    check(model, numbers.tokens(*nt, vocabulary=v), numbers(*nt), dtype=dtype)


def test_several_bags_of_an_example() -> None:
    model = Using(lambda m, x: m.bag(x.flatten(0, 1)).unflatten(0, (len(x), -1)), bag=nn.EmbeddingBag(6, 3))
    check(model, Numbers().tokens(4, 3, 5, vocabulary=6))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.embedding_bag(x, m.w, mode="max"),
        lambda m, x: F.embedding_bag(x.flatten(), m.w, torch.arange(len(x)) * x.shape[1]),
        lambda m, x: F.embedding_bag(x, m.w, per_sample_weights=m.v.expand(len(x), -1), mode="sum"),
        lambda m, x: F.embedding_bag(x, m.w.exp(), per_sample_weights=m.v.sigmoid().expand(len(x), -1), mode="sum"),
    ],
    ids=["max", "offsets", "learned weights", "derived table and learned weights"],
)
def test_bags_that_no_rule_knows_are_exact_or_refused(function: Callable[[Any, Tensor], Tensor]) -> None:
    numbers = Numbers()
    exact_or_refused(Using(function, w=numbers(6, 3), v=numbers(4)), numbers.tokens(4, 4, vocabulary=6))


@settings(max_examples=15, deadline=None)
@given(nt=examples_and_positions(), v=st.integers(1, 6), d=sizes, bias=st.booleans(), dtype=dtypes)
def test_embedding_tied_to_the_output_layer(
    nt: tuple[int, int], v: int, d: int, bias: bool, dtype: torch.dtype
) -> None:
    embedding, output = nn.Embedding(v, d), nn.Linear(d, v, bias=bias)
    output.weight = embedding.weight
    model = Using(lambda m, x: m.output(torch.tanh(m.embedding(x))), embedding=embedding, output=output)
    check(model, Numbers().tokens(*nt, vocabulary=v), dtype=dtype)


TIED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "product with the transposed": lambda m, x: torch.tanh(m.e(x)) @ m.e.weight.t(),
    "einsum": lambda m, x: torch.einsum("ntd,vd->ntv", torch.tanh(m.e(x)), m.e.weight),
    "two lookups, two outputs": lambda m, x: (
        F.linear(torch.tanh(m.e(x)), m.e.weight) + F.linear(m.e(x.flip(1)).sin(), m.e.weight)
    ),
    "scaled": lambda m, x: F.linear(torch.tanh(m.e(x)), 0.5 * m.e.weight),
    "part of the table": lambda m, x: F.linear(torch.tanh(m.e(x)), m.e.weight[:2]),
    "with a padded row": lambda m, x: F.linear(torch.tanh(F.embedding(x, m.e.weight, 1)), m.e.weight),
    "added to the data": lambda m, x: m.e(x) + m.e.weight[0],
}


@pytest.mark.parametrize("name", TIED)
@settings(max_examples=5, deadline=None)
@given(nt=examples_and_positions(), d=sizes, dtype=dtypes)
def test_embedding_tied_in_other_ways(name: str, nt: tuple[int, int], d: int, dtype: torch.dtype) -> None:
    check(Using(TIED[name], e=nn.Embedding(4, d)), Numbers().tokens(*nt, vocabulary=4), dtype=dtype)


def test_a_tied_norm_is_not_below_the_truth_where_the_two_uses_cancel() -> None:
    """Lookups that take the products' gradient back but for a thousandth: the cross term is a large difference."""
    numbers, (n, t, v, d) = Numbers(), (200, 1, 6, 4)  # of one position, products have no margin of their own
    a, g = numbers(n, 1, t, d).float(), numbers(n, 1, t, v).float()
    back = -1.001 * torch.einsum("nstd,nstv->nvd", a, g)
    tied = Tied(
        Lookups(torch.arange(v).expand(n, v), back, torch.Size((v, d)), None),
        OuterProducts(a, g, Arrangement(shape=(v, d), order=(0, 1)), keeps_operands=True),
    )
    true = (torch.einsum("nstd,nstv->nvd", a.double(), g.double()) + back.double()).flatten(1).square().sum(1)
    found = tied.norms_squared().double()
    assert (found >= true).all()
    assert (found <= 1000 * true).all()


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                held = leaf.untyped_storage().nbytes() // leaf.element_size()  # an expanded tensor holds few
                self.numbers = max(self.numbers, held)
        return result


N, T, V, D = 6, 4, 50, 32

NO_TABLES: dict[str, nn.Module] = {
    "embedding": nn.Embedding(V, D),
    "padding": nn.Embedding(V, D, padding_idx=0),
    "bag": nn.EmbeddingBag(V, D),
    "index_select": Using(LOOKED_UP["index_select"], w=Numbers()(V, D)),
    "w[x]": Using(LOOKED_UP["w[x]"], w=Numbers()(V, D)),
    "twice": Using(lambda m, x: m.e(x) + m.e(x.flip(1)), e=nn.Embedding(V, D)),
    "tied": Using(lambda m, x: F.linear(m.e(x), m.e.weight), e=nn.Embedding(V, D)),
    "tied, with a layer between": Using(
        lambda m, x: F.linear(torch.relu(m.l(m.e(x))), m.e.weight), e=nn.Embedding(V, D), l=nn.Linear(D, D)
    ),
}


@pytest.mark.parametrize("name", NO_TABLES)
def test_no_table_is_made_for_each_example(name: str) -> None:
    """Neither for norms nor for the weighted sum is there a tensor of N V D numbers."""
    model = NO_TABLES[name]
    tokens = Numbers().tokens(N, T, vocabulary=V)
    assert math.prod((N, T, V)) < N * V * D  # the logits are smaller
    largest = Largest()
    with largest:
        forward = TapeEngine(model).forward(ExampleBatch.from_call((tokens,), {}), dict(model.named_parameters()))
        (output,) = forward.outputs
        (part,) = forward.pull_back({0: cotangents_of([tuple(output.shape)])[0].to(output.dtype)})
        part.norms()
        part.weighted_sum(weights_of(N))
    assert V * D <= largest.numbers < N * V * D
    with largest:
        part.materialize()
    assert largest.numbers >= N * V * D  # as it would have been seen
