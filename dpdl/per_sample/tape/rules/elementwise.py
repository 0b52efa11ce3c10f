"""Data plus, minus or times something learned: positions, biases, scales, the affine part of normalisations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dpdl.per_sample.tape.batch_axis import BatchAxis
from dpdl.per_sample.tape.contribution import Contribution, Materialized
from dpdl.per_sample.tape.rules.rule import Rule, RuleCall
from dpdl.per_sample.tape.source import Source

__all__ = ["RULES", "broadcast_source", "reduced"]


def add(call: RuleCall, first: Any, second: Any, *, alpha: float = 1) -> Any:
    """first + alpha * second, one of them learned and broadcast over examples."""
    return _sum(call, first, second, 1.0, alpha)


def subtract(call: RuleCall, first: Any, second: Any, *, alpha: float = 1) -> Any:
    """first - alpha * second."""
    return _sum(call, first, second, 1.0, -alpha)


def subtract_from(call: RuleCall, first: Any, second: Any) -> Any:
    """second - first."""
    return _sum(call, second, first, 1.0, -1.0)


def _sum(call: RuleCall, first: Any, second: Any, scale_first: float, scale_second: float) -> Any:
    learned, data, scale = (first, second, scale_first) if call.source(first) else (second, first, scale_second)
    source = broadcast_source(call, learned, data)
    axis = call.output_axis
    if source is None or axis is None:
        return NotImplemented
    output = torch.add(call.constant(first), call.constant(second), alpha=scale_second)
    shape = source.tensor.shape

    def contributions(kept: tuple[Tensor, ...], gradient: Tensor) -> Iterable[tuple[Source, Contribution]]:
        total = reduced(call, gradient, axis, shape)
        yield source, Materialized(total if scale == 1 else total * scale)

    return call.tap(output, (), contributions, source)


def multiply(call: RuleCall, first: Any, second: Any) -> Any:
    """first * second, one of them learned and broadcast over examples."""
    learned, data = (first, second) if call.source(first) else (second, first)
    source = broadcast_source(call, learned, data)
    axis = call.output_axis
    if source is None or axis is None:
        return NotImplemented
    output = torch.mul(call.constant(first), call.constant(second))
    shape = source.tensor.shape

    def contributions(kept: tuple[Tensor, ...], gradient: Tensor) -> Iterable[tuple[Source, Contribution]]:
        yield source, Materialized(reduced(call, gradient, axis, shape, factor=kept[0]))

    return call.tap(output, (data,), contributions, source)


def broadcast_source(call: RuleCall, learned: Any, data: Any) -> Source | None:
    """The source, if it is a real one beside floating-point data of no fewer axes that carries the examples, and it
    does not itself reach along the axis of the examples."""
    source = call.source(learned)
    if source is None or not isinstance(data, Tensor) or call.source(data) is not None:
        return None
    axis = call.axis(data)
    if axis is None or not data.is_floating_point() or learned.ndim > data.ndim:
        return None
    own = learned.ndim - (data.ndim - axis.position)  # the learned tensor's axis that meets the examples
    return None if own >= 0 and learned.shape[own] != 1 else source


def reduced(
    call: RuleCall, gradient: Tensor, axis: BatchAxis, shape: torch.Size, *, factor: Tensor | None = None
) -> Tensor:
    """The gradient (times a factor), summed for each example over all that the learned tensor was broadcast along."""
    g = call.front(gradient, axis)  # [n, k, ...]
    missing = gradient.ndim - len(shape)
    sizes = [1] * missing + list(shape)  # the learned tensor as the output sees it
    del sizes[axis.position]
    along = [1] + [2 + i for i, (own, full) in enumerate(zip(sizes, g.shape[2:], strict=True)) if own != full]
    if factor is not None:
        if factor.ndim < gradient.ndim or factor.shape != gradient.shape:
            factor = factor.expand_as(gradient)
        g = g * call.front(factor, axis)
    return g.sum(along).reshape(g.shape[0], *shape)


RULES: dict[Any, Rule] = {
    torch.add: add,
    torch.Tensor.add: add,
    torch.Tensor.__add__: add,
    torch.Tensor.__radd__: add,
    torch.sub: subtract,
    torch.Tensor.sub: subtract,
    torch.Tensor.__sub__: subtract,
    torch.rsub: subtract_from,
    torch.Tensor.__rsub__: subtract_from,
    torch.mul: multiply,
    torch.Tensor.mul: multiply,
    torch.Tensor.__mul__: multiply,
    torch.Tensor.__rmul__: multiply,
}
