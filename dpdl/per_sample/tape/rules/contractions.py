"""Contractions of data with a weight: linear, matmul and its kin, einsum.

Each is written as an einsum over letters. Of the weight's letters those that data and output have too are shared
(s), those that only data has are inputs (i), those that only the output has are outputs (o); all others of the
data are positions (t).
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpdl.per_sample.tape.batch_axis import BatchAxis
from dpdl.per_sample.tape.contribution import Contribution, Materialized
from dpdl.per_sample.tape.rules.products import Arrangement, OuterProducts
from dpdl.per_sample.tape.rules.rule import Rule, RuleCall
from dpdl.per_sample.tape.source import Source

__all__ = ["RULES"]


@dataclass(frozen=True, kw_only=True)
class _Letters:
    """The axes of a contraction's data, weight and output."""

    data: str
    weight: str
    output: str


def linear(call: RuleCall, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """output = input weight^T + bias, any number of leading axes."""
    axis = call.axis(input)
    if (
        axis is None
        or call.axis(weight) is not None
        or call.source(input) is not None
        or axis.position == input.ndim - 1
    ):
        return NotImplemented
    of_weight, of_bias = call.source(weight), call.source(bias)
    output = F.linear(input, call.constant(weight), call.constant(bias))

    def contributions(kept: tuple[Tensor, ...], gradient: Tensor) -> Iterable[tuple[Source, Contribution]]:
        g = call.front(gradient, call.output_axis or axis).flatten(1, -2)  # [n, t, o]
        if of_weight is not None:
            a = call.front(kept[0], axis).flatten(1, -2)
            order = Arrangement(shape=(g.shape[2], a.shape[2]), order=(0, 1))
            yield of_weight, OuterProducts(a.unsqueeze(1), g.unsqueeze(1), order)
        if of_bias is not None:
            yield of_bias, Materialized(g.sum(1) if g.shape[1] != 1 else g.squeeze(1))

    return call.tap(output, (input,) if of_weight is not None else (), contributions, of_weight, of_bias)


def matmul(call: RuleCall, first: Tensor, second: Tensor) -> Any:
    """torch.matmul and its kin with a weight on either side."""
    weight_first = call.source(first) is not None
    data, weight = (second, first) if weight_first else (first, second)
    if data.ndim < 2 or weight.ndim < 2:
        return NotImplemented
    return _contract(call, _matmul_letters(data.ndim, weight.ndim, weight_first), data, weight)


@cache
def _matmul_letters(data_ndim: int, weight_ndim: int, weight_first: bool) -> _Letters:
    """For data [..., t, i] @ weight [..., i, o], or weight [..., o, i] @ data [..., i, t]."""
    batch = max(data_ndim, weight_ndim) - 2
    lead = string.ascii_lowercase[:batch]
    of_data, of_weight = lead[batch - (data_ndim - 2) :], lead[batch - (weight_ndim - 2) :]
    if weight_first:
        return _Letters(data=of_data + "yz", weight=of_weight + "xy", output=lead + "xz")
    return _Letters(data=of_data + "xy", weight=of_weight + "yz", output=lead + "xz")


def einsum(call: RuleCall, equation: str, operands: Any) -> Any:
    """einsum of data and one weight, each letter at most once in each."""
    tensors = tuple(operands) if isinstance(operands, (list, tuple)) else (operands,)
    letters = _parsed(equation, tuple(t.ndim for t in tensors)) if len(tensors) == 2 else None
    if letters is None:
        return NotImplemented
    if call.source(tensors[0]) is not None:
        letters = _Letters(data=letters.weight, weight=letters.data, output=letters.output)
        tensors = (tensors[1], tensors[0])
    return _contract(call, letters, *tensors)


@cache
def _parsed(equation: str, ndims: tuple[int, ...]) -> _Letters | None:
    """A two-operand equation with its ellipses and its output spelled out; None if letters repeat in an operand."""
    equation = equation.replace(" ", "")
    left, arrow, output = equation.partition("->")
    terms = left.split(",")
    spare = [c for c in string.ascii_letters if c not in equation]
    most = max(
        (ndim - len(t.replace("...", "")) for t, ndim in zip(terms, ndims, strict=True) if "..." in t), default=0
    )
    rest = "".join(spare[:most])
    spelled = []
    for term, ndim in zip(terms, ndims, strict=True):
        own = ndim - len(term.replace("...", ""))
        spelled.append(term.replace("...", rest[most - own :] if own else ""))
    if not arrow:
        joined = "".join(spelled)
        output = rest + "".join(sorted(c for c in set(joined) - set(rest) if joined.count(c) == 1))
    else:
        output = output.replace("...", rest)
    if any(len(set(term)) < len(term) for term in (*spelled, output)):
        return None
    return _Letters(data=spelled[0], weight=spelled[1], output=output)


def _contract(call: RuleCall, letters: _Letters, data: Tensor, weight: Tensor) -> Any:
    """einsum(data, weight -> output) with the weight as a constant."""
    axis, output_axis = call.axis(data), call.output_axis
    of_weight = call.source(weight)
    if axis is None or output_axis is None or of_weight is None or call.source(data) is not None:
        return NotImplemented
    if data.is_complex() or weight.is_complex():
        return NotImplemented  # adjoints are conjugates: autograd knows them
    example = letters.data[axis.position]
    broadcast = any(weight.shape[i] == 1 and c in letters.data for i, c in enumerate(letters.weight))
    lost = [c for c in letters.data if c not in letters.output and c not in letters.weight]
    alone = [c for c in letters.weight if c not in letters.output and c not in letters.data]
    if example in letters.weight or example != letters.output[output_axis.position] or broadcast or lost or alone:
        return NotImplemented
    if any(data.shape[i] == 1 and c in letters.weight for i, c in enumerate(letters.data)):
        return NotImplemented  # broadcasting the other way: the letters do not tell axes of size 1 apart
    equation = f"{letters.data},{letters.weight}->{letters.output}"
    output = torch.einsum(equation, data, call.constant(weight))
    sizes = dict(zip(letters.weight, weight.shape, strict=True))

    def contributions(kept: tuple[Tensor, ...], gradient: Tensor) -> Iterable[tuple[Source, Contribution]]:
        s = [c for c in letters.weight if c in letters.data and c in letters.output]
        i = [c for c in letters.weight if c in letters.data and c not in letters.output]
        o = [c for c in letters.weight if c not in letters.data]
        t = [c for c in letters.data if c not in letters.weight and c != example]
        a = _grouped(call, kept[0], axis, letters.data, (s, t, i))
        g = _grouped(call, gradient, output_axis, letters.output, (s, t, o))
        axes = [*s, *o, *i]
        order = Arrangement(shape=tuple(sizes[c] for c in axes), order=tuple(axes.index(c) for c in letters.weight))
        yield of_weight, OuterProducts(a, g, order)

    return call.tap(output, (data,), contributions, of_weight)


def _grouped(call: RuleCall, tensor: Tensor, axis: BatchAxis, letters: str, groups: tuple[list[str], ...]) -> Tensor:
    """[n, s, t, x]: axes of each group joined; an example's own rows are positions."""
    front = call.front(tensor, axis)  # [n, k, ...]
    others = letters[: axis.position] + letters[axis.position + 1 :]
    where = {c: 2 + i for i, c in enumerate(others)}
    s, t, x = groups
    front = front.permute(0, *(where[c] for c in s), 1, *(where[c] for c in t), *(where[c] for c in x))
    shape = front.shape
    return front.reshape(
        shape[0],
        shape[1 : 1 + len(s)].numel(),
        shape[1 + len(s) : 2 + len(s) + len(t)].numel(),
        shape[2 + len(s) + len(t) :].numel(),
    )


RULES: dict[Any, Rule] = {
    F.linear: linear,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.__matmul__: matmul,
    torch.mm: matmul,
    torch.Tensor.mm: matmul,
    torch.bmm: matmul,
    torch.Tensor.bmm: matmul,
    torch._VF.einsum: einsum,  # type: ignore[attr-defined]  # what torch.einsum ends in
}
