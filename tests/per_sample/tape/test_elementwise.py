"""Something learned beside data, element by element: scales, positions, tokens put in; by rule, in place, by vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dpdl
from dpdl.errors import EngineMismatchError, ModelError
from tests.per_sample.tape.against_autograd import (
    Numbers,
    Using,
    check,
    dtypes,
    exact_or_refused,
    examples_and_positions,
    refusal_of,
    shapes,
    sizes,
)

Forward = Callable[[Any, Tensor], Tensor]

OPERATIONS: dict[str, Forward] = {
    "x + w": lambda m, x: x + m.w,
    "w + x": lambda m, x: m.w + x,
    "x - w": lambda m, x: x - m.w,
    "w - x": lambda m, x: m.w - x,
    "x * w": lambda m, x: x * m.w,
    "w * x": lambda m, x: m.w * x,
    "x / w": lambda m, x: x / (3 + m.w.square()),
    "w / x": lambda m, x: m.w / (3 + x.square()),
    "torch.add, alpha": lambda m, x: torch.add(x, m.w, alpha=-0.5),
    "torch.add, alpha on the data": lambda m, x: torch.add(m.w, x, alpha=-0.5),
    "torch.sub, alpha": lambda m, x: torch.sub(x, m.w, alpha=3),
    "torch.sub, alpha on the data": lambda m, x: torch.sub(m.w, x, alpha=3),
    "x.add": lambda m, x: x.add(m.w, alpha=2),
    "w.mul": lambda m, x: m.w.mul(x),
    "torch.multiply": lambda m, x: torch.multiply(x, m.w),
    "torch.subtract": lambda m, x: torch.subtract(m.w, x),
    "torch.rsub": lambda m, x: torch.rsub(x, m.w),
    "pow": lambda m, x: (1 + x.square()) ** m.w,
    "w to the power of data": lambda m, x: (1.5 + m.w.square()) ** x.sin(),
    "maximum": lambda m, x: torch.maximum(x, m.w),
    "where": lambda m, x: torch.where(x > 0, x, m.w),
    "where by w": lambda m, x: torch.where(m.w > 0, x * m.w, x),
    "addcmul": lambda m, x: torch.addcmul(x, x, m.w, value=0.5),
    "addcmul to w": lambda m, x: torch.addcmul(m.w, x, x),
    "addcdiv": lambda m, x: torch.addcdiv(x, m.w, 1 + x.square()),
    "lerp": lambda m, x: torch.lerp(x, x.sin(), m.w),
    "lerp to w": lambda m, x: torch.lerp(x, m.w.expand_as(x), 0.3),
    "atan2": lambda m, x: torch.atan2(x, m.w),
    "twice": lambda m, x: x * m.w + m.w,
    "thrice": lambda m, x: (x + m.w) * m.w - m.w,
    "in both": lambda m, x: m.w * x * m.w,
    "clamp by w": lambda m, x: torch.clamp(x, min=m.w),
    "double where": lambda m, x: torch.where(x > 0, m.w, m.w * x),
    "fma by hand": lambda m, x: x.mul(m.w).add(m.w.square()),
    "stack": lambda m, x: torch.stack([x, m.w.expand_as(x)], 1),
    "stack last": lambda m, x: torch.stack([x, m.w.expand_as(x)], -1),
}


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=6, deadline=None)
@given(
    nt=examples_and_positions(), d=sizes, form=st.sampled_from(["d", "td", "1td", "t1", "11", "1", ""]), dtype=dtypes
)
def test_learned_broadcast_to_data(name: str, nt: tuple[int, int], d: int, form: str, dtype: torch.dtype) -> None:
    numbers = Numbers()
    size = {"t": nt[1], "d": d, "1": 1}
    check(Using(OPERATIONS[name], w=numbers(*(size[c] for c in form))), numbers(*nt, d), dtype=dtype)


BOTH_WAYS: dict[str, Forward] = {
    name: OPERATIONS[name] for name in ("x + w", "w + x", "x - w", "w - x", "x * w", "w * x", "where", "x / w", "lerp")
}


@pytest.mark.parametrize("name", BOTH_WAYS)
@settings(max_examples=6, deadline=None)
@given(
    data=st.sampled_from(["n1", "n1d", "nt1", "n11", "n"]),
    weight=st.sampled_from(["d", "td", "t1", "1d", "htd"]),
    nt=examples_and_positions(),
    d=sizes,
    dtype=dtypes,
)
def test_data_broadcast_to_the_learned(
    name: str, data: str, weight: str, nt: tuple[int, int], d: int, dtype: torch.dtype
) -> None:
    """Data of size 1 where the weight is wide; also of fewer axes, where the examples would meet another axis."""
    numbers, size = Numbers(), {"n": nt[0], "t": nt[1], "d": d, "1": 1, "h": 2}
    x = numbers(*(size[c] for c in data))
    if len(weight) >= len(data):  # a model of one example then broadcasts; of several, it would mix or fail
        x = x.view(nt[0], *[1] * (1 + len(weight) - len(data)), *x.shape[1:])
    check(Using(BOTH_WAYS[name], w=numbers(*(size[c] for c in weight))), x, dtype=dtype)


@settings(max_examples=20, deadline=None)
@given(nt=examples_and_positions(), d=sizes, position=st.integers(1, 2), dtype=dtypes)
def test_positions_added_where_the_examples_come_later(
    nt: tuple[int, int], d: int, position: int, dtype: torch.dtype
) -> None:
    """[T, N, d] + [T, 1, d]: T == N looks like one position for each example."""
    numbers, (n, t) = Numbers(), nt
    weight = numbers(t, 1, d) if position == 1 else numbers(t, d, 1)
    for operation in (torch.add, torch.mul, torch.sub):
        model = Using(
            lambda m, x, operation=operation: operation(x.movedim(0, position), m.w).movedim(position, 0), w=weight
        )
        check(model, numbers(n, t, d), dtype=dtype)


TOKENS: dict[str, Forward] = {
    "expand and cat": lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1),
    "expand by -1": lambda m, x: torch.cat([x, m.token.expand(x.shape[0], -1, -1)], dim=1),
    "expand_as": lambda m, x: torch.cat([m.token.expand_as(x[:, :1]), x], 1),
    "broadcast_to": lambda m, x: torch.cat([torch.broadcast_to(m.token, (len(x), 1, x.shape[2])), x], 1),
    "repeat": lambda m, x: torch.cat([m.token.repeat(len(x), 1, 1), x], 1),
    "tile": lambda m, x: torch.cat([torch.tile(m.token, (len(x), 1, 1)), x], 1),
    "repeat_interleave": lambda m, x: torch.cat([m.token.repeat_interleave(len(x), 0), x], 1),
    "a slice expanded": lambda m, x: torch.cat([m.token[0, 0].expand(len(x), 1, -1), x], 1),
    "plus zeros of the data": lambda m, x: torch.cat([m.token + 0 * x[:, :1], x], 1),
    "expand then in place": lambda m, x: torch.cat([m.token.expand(len(x), -1, -1).clone().mul_(2), x], 1),
    "expanded twice": lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x, m.token.expand(len(x), 2, -1)], 1),
    "expanded in width": lambda m, x: x + m.token[..., :1].expand(len(x), x.shape[1], x.shape[2]),
    "time first": lambda m, x: torch.cat([m.token.expand(-1, len(x), -1), x.transpose(0, 1)]).transpose(0, 1),
    "ones of the data times it": lambda m, x: torch.cat([torch.ones_like(x[:, :1]) * m.token, x], 1),
    "einsum with ones": lambda m, x: x + torch.einsum("n,td->ntd", torch.ones_like(x[:, 0, 0]), m.token[0]),
    "new_zeros plus it": lambda m, x: x.new_zeros(len(x), 1, x.shape[2]) + m.token + x[:, :1],
}


@pytest.mark.parametrize("name", TOKENS)
@settings(max_examples=6, deadline=None)
@given(nt=examples_and_positions(), d=sizes, dtype=dtypes)
def test_tokens_put_beside_the_data(name: str, nt: tuple[int, int], d: int, dtype: torch.dtype) -> None:
    numbers = Numbers()
    model = Using(
        lambda m, x: torch.tanh(TOKENS[name](m, torch.tanh(m.layer(x)))), layer=nn.Linear(d, d), token=numbers(1, 1, d)
    )
    check(model, numbers(*nt, d), dtype=dtype)


def written(*steps: str) -> Forward:
    """A forward that runs statements on z, a copy of the data, with w, m and x at hand."""
    code = compile("\n".join(steps), "<written>", "exec")

    def forward(m: Any, x: Tensor) -> Tensor:
        names = {"m": m, "x": x, "z": 2 * torch.tanh(m.layer(x)), "torch": torch}
        exec(code, names)
        return torch.sin(names["z"])

    return forward


IN_PLACE: dict[str, Forward] = {
    "row": written("z[:, 0] = m.w"),
    "last row": written("z[:, -1] = m.w"),
    "a slice of rows": written("z[:, :2] = m.w"),
    "ellipsis": written("z[..., 0] = m.w[0]"),
    "one number": written("z[:, 0, 0] = m.w[0]"),
    "by mask": written("z[x[..., 0] > 0] = m.w"),
    "by mask of one example's numbers": written("z[x > 0] = m.w[0]"),
    "by index": written("z[:, [0]] = m.w"),
    "everything": written("z[:] = m.w"),
    "derived": written("z[:, 0] = 2 * m.w.exp()"),
    "overwritten": written("z[:, 0] = m.w", "z[:, 0] = m.w * 2"),
    "read after": written("z[:, 0] = m.w", "z = z * z.sum(1, keepdim=True)"),
    "written into twice": written("z[:, 0] = m.w", "z[:, -1] = m.w"),
    "add_": written("z.add_(m.w)"),
    "add_ with alpha": written("z.add_(m.w, alpha=-2)"),
    "+=": written("z += m.w"),
    "mul_": written("z.mul_(m.w)"),
    "*=": written("z *= m.w"),
    "*= twice": written("z *= m.w", "z *= m.w"),
    "add_ to a view": written("z[:, 0].add_(m.w)"),
    "+= to a slice": written("z[:, 0] += m.w"),
    "*= to a slice": written("z[:, :2] *= m.w"),
    "-=": written("z -= m.w"),
    "/=": written("z /= 3 + m.w.square()"),
    "sub_": written("z.sub_(m.w)"),
    "copy_": written("z.copy_(m.w.expand_as(z))"),
    "masked_fill_": written("z = z.masked_fill(x > 0, m.w[0])"),
    "masked_fill in place": written("z.masked_fill_(x > 0, m.w[0])"),
    "index_put": written("z = z.index_put((torch.arange(len(z)),), m.w)"),
    "a fixed row of the batch": written("z[0] = m.w"),
    "addcmul_": written("z.addcmul_(x, m.w)"),
}
# What mixes examples, or what a rule may well decline.
MAY_BE_REFUSED = {
    "-=", "/=", "sub_", "copy_", "masked_fill in place", "index_put", "addcmul_", "one number",
    "by index", "everything", "ellipsis", "by mask of one example's numbers", "derived",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in IN_PLACE if name != "a fixed row of the batch"])
@settings(max_examples=6, deadline=None)
@given(nt=examples_and_positions(), d=sizes, dtype=dtypes)
def test_written_into_the_data(name: str, nt: tuple[int, int], d: int, dtype: torch.dtype) -> None:
    numbers = Numbers()
    model = Using(IN_PLACE[name], layer=nn.Linear(d, d), w=numbers(d))
    if name in MAY_BE_REFUSED:
        exact_or_refused(model, numbers(*nt, d), dtype=dtype)
    else:
        check(model, numbers(*nt, d), dtype=dtype)


@settings(max_examples=15, deadline=None)
@given(nt=examples_and_positions(), d=sizes, seed=st.integers(0, 50), dtype=dtypes)
def test_masked_tokens(nt: tuple[int, int], d: int, seed: int, dtype: torch.dtype) -> None:
    """x[mask] = token, the mask an input: none of an example's positions, or all of them, may be masked."""
    numbers = Numbers(seed)

    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        z = m.layer(x)
        z[mask] = m.token
        return torch.tanh(z)

    mask = numbers(*nt) > 0
    check(Using(forward, layer=nn.Linear(d, d), token=numbers(d)), numbers(*nt, d), mask, dtype=dtype)


OTHERS: dict[str, tuple[Forward, tuple[int, ...]]] = {
    "prelu": (lambda m, x: F.prelu(x, m.w), (1,)),
    "prelu, a slope for each channel": (lambda m, x: F.prelu(x, m.w), (4,)),
    "bilinear": (lambda m, x: F.bilinear(x, x.flip(1).contiguous(), m.w), (2, 3, 3)),
    "cdist": (lambda m, x: torch.cdist(x, m.w), (5, 3)),
    "cosine similarity": (lambda m, x: F.cosine_similarity(x, m.w, dim=-1), (3,)),
    "mixture": (lambda m, x: (torch.softmax(m.w, 0) * x).sum(-1), (3,)),
    "cat with a learned row": (lambda m, x: torch.cat([x, m.w.expand(len(x), 2, 3)], 1), (2, 3)),
    "kron by hand": (lambda m, x: (x.unsqueeze(-1) * m.w).flatten(-2), (2,)),
    "temperature": (lambda m, x: torch.softmax(x * m.w.exp(), -1), ()),
    "temperature as a divisor": (lambda m, x: torch.softmax(x / m.w.exp(), -1), ()),
    "attention with learned queries": (
        lambda m, x: F.scaled_dot_product_attention(m.w.expand(len(x), 2, 3), x, x),
        (2, 3),
    ),
    "learned keys": (
        lambda m, x: F.scaled_dot_product_attention(x, m.w.expand(len(x), -1, -1), m.w.expand(len(x), -1, -1)),
        (5, 3),
    ),
    "a position bias in attention": (lambda m, x: torch.softmax(x @ x.mT + m.w, -1) @ x, (4, 4)),
    "the same as a mask": (lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.w), (4, 4)),
    "interpolated positions": (lambda m, x: x + F.interpolate(m.w, size=4, mode="linear").transpose(1, 2), (1, 3, 2)),
    "prompts": (lambda m, x: torch.cat([m.w.unsqueeze(0).expand(len(x), -1, -1), x], 1).cumsum(1), (2, 3)),
    "sum of squares to prototypes": (lambda m, x: (x.unsqueeze(2) - m.w).square().sum(-1), (5, 3)),
    "gumbel": (lambda m, x: x * torch.sigmoid(m.w) + (1 - torch.sigmoid(m.w)) * x.flip(1), (3,)),
    "Fourier features": (lambda m, x: torch.cat([torch.sin(x @ m.w), torch.cos(x @ m.w)], -1), (3, 6)),
    "polynomial": (lambda m, x: sum(m.w[k] * x**k for k in range(4)), (4,)),
    "cumulative": (lambda m, x: torch.cumsum(x * m.w, 1), (3,)),
    "scalar by item of a list": (lambda m, x: torch.stack([x * m.w[k] for k in range(2)], 1), (2,)),
    "rotary": (lambda m, x: x * torch.cos(m.w) + x.roll(1, -1) * torch.sin(m.w), (4, 3)),
    "layer scale and skip": (lambda m, x: x + m.w * torch.relu(x), (3,)),
    "renormalised weight": (lambda m, x: F.linear(F.normalize(x, dim=-1), F.normalize(m.w, dim=-1)), (5, 3)),
    "logsumexp": (lambda m, x: torch.logsumexp(x + m.w, -1), (3,)),
    "spline basis": (lambda m, x: (torch.relu(x.unsqueeze(-1) - m.w) ** 3).sum(-1), (5,)),
    "dist": (lambda m, x: F.pairwise_distance(x, m.w), (3,)),
    "cross": (lambda m, x: torch.linalg.cross(x, m.w.expand_as(x)), (3,)),
    "solve": (lambda m, x: torch.linalg.solve(torch.eye(3).to(x) * 5 + m.w, x.mT).mT, (3, 3)),
    "fft": (lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.fft.rfft(m.w, dim=0), n=4, dim=1), (4, 3)),
    "complex weight": (
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.view_as_complex(m.w), n=4, dim=1),
        (3, 3, 2),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("n", [4, 1])
def test_whatever_else_is_made_of_learned_and_data(name: str, n: int, dtype: torch.dtype) -> None:
    """Four positions and, once, four examples."""
    forward, shape = OTHERS[name]
    numbers = Numbers()
    check(Using(forward, w=numbers(*shape)), numbers(n, 4, 3), dtype=dtype)


@settings(max_examples=10, deadline=None)
@given(n=sizes, shape=shapes(), dtype=dtypes)
def test_a_learned_number(n: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for forward in (lambda m, x: m.w * x, lambda m, x: x + m.w, lambda m, x: x - m.w, lambda m, x: m.w - x):
        check(Using(forward, w=Numbers()()), Numbers()(n, *shape), dtype=dtype)


def test_integers_and_booleans_times_something_learned() -> None:
    numbers = Numbers()
    for forward in (lambda m, x: x * m.w, lambda m, x: m.w * (x > 1), lambda m, x: x + m.w, lambda m, x: m.w - x):
        check(Using(forward, w=numbers(3)), numbers.tokens(4, 4, 3, vocabulary=3))


def test_as_many_operands_as_there_are_examples_is_refused() -> None:
    model = Using(lambda m, x: torch.cat([torch.cat([m.token] * len(x)), x], 1), token=Numbers()(1, 1, 3))
    refusal = refusal_of(model, Numbers()(4, 2, 3).float())
    assert "cat" in refusal
    assert "token" in refusal


def test_a_row_written_for_one_example_of_the_batch_is_refused() -> None:
    """z[0] = w depends on where an example stands in the batch; alone, every example is the first."""
    model = Using(IN_PLACE["a fixed row of the batch"], layer=nn.Linear(3, 3), w=Numbers()(3))
    with pytest.raises((ModelError, EngineMismatchError)):
        dpdl.per_sample_gradients(
            model, lambda o, y: o.sum(), Numbers()(4, 4, 3).float(), None, engine="tape", loss_reduction="sum"
        )


EXCHANGED_COPIES: dict[str, Forward] = {
    "flip": lambda m, x: m.token.expand(len(x), -1).flip(0) * x,
    "roll": lambda m, x: m.token.expand(len(x), -1).roll(1, 0) * x,
    "indexed": lambda m, x: m.token.expand(len(x), -1)[torch.arange(len(x)).flip(0)] * x,
    "masked_scatter": lambda m, x: x.masked_scatter(x > 2, m.token.expand_as(x)).sin() * x,
    "boolean rows": lambda m, x: m.token.expand(len(x), -1)[x[:, 0].argsort()] * x,
    "the first one's for all": lambda m, x: m.token.expand(len(x), -1)[:1] * x,
    "their mean": lambda m, x: m.token.expand(len(x), -1).mean(0) * x,
}


@pytest.mark.parametrize("name", EXCHANGED_COPIES)
def test_copies_that_reach_another_example_are_refused(name: str) -> None:
    """All copies of a token are equal: that the model gives one example's to another shows in gradients alone."""
    x = Numbers()(4, 4)
    x[:2] = x[:2].abs().clamp(max=1)
    x[2:] = 3.0
    model = Using(EXCHANGED_COPIES[name], token=torch.ones(4).double())
    true = dpdl.per_sample_gradients(model, lambda o, _: o.sum(), x, None, engine="loop", loss_reduction="sum")
    try:
        found = dpdl.per_sample_gradients(model, lambda o, _: o.sum(), x, None, engine="tape", loss_reduction="sum")
    except ModelError:
        return
    torch.testing.assert_close(found["token"], true["token"], rtol=1e-10, atol=1e-12)
