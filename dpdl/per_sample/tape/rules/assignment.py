"""Something learned written into data in place: tokens put into a sequence, additions and scalings in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dpdl.per_sample.tape.contribution import Contribution, Materialized
from dpdl.per_sample.tape.rules.elementwise import broadcast_source, reduced
from dpdl.per_sample.tape.rules.rule import Rule, RuleCall
from dpdl.per_sample.tape.source import Source

__all__ = ["RULES"]


def assign(call: RuleCall, data: Tensor, index: Any, value: Any) -> Any:
    """data[index] = value, with the examples' axis not among those that `value` has."""
    source, axis = call.source(value), call.axis(data)
    if source is None or axis is None or call.source(data) is not None or not data.is_floating_point():
        return NotImplemented
    examples, shape = call.examples, value.shape
    # Whose example each number of `data` is, without storing it for each.
    rows = torch.arange(data.shape[axis.position], device=data.device)
    owner = rows % examples if axis.order == "inner" else rows // (data.shape[axis.position] // examples)
    owner = owner.view([-1 if i == axis.position else 1 for i in range(data.ndim)]).expand_as(data)[index]
    lead = owner.ndim - len(shape)
    inner = owner.flatten(0, lead - 1).flatten(1) if 0 < lead < owner.ndim else owner.reshape(-1, 1)
    if lead < 1 or not bool((inner == inner[:, :1]).all()):
        return NotImplemented
    data[index] = call.constant(value)

    def contributions(kept: tuple[Tensor, ...], gradient: Tensor) -> Iterable[tuple[Source, Contribution]]:
        g = call.widened(gradient)[index]
        sums = g.new_zeros((examples, *g.shape[lead:])).index_add_(0, inner[:, 0], g.flatten(0, lead - 1))
        along = [1 + i for i, (own, full) in enumerate(zip(shape, g.shape[lead:], strict=True)) if own != full]
        yield source, Materialized((sums.sum(along) if along else sums).reshape(examples, *shape))

    call.tap(data, (), contributions, source)
    return None


def add_in_place(call: RuleCall, data: Tensor, value: Any, *, alpha: float = 1) -> Any:
    """data += alpha * value."""
    source, axis = broadcast_source(call, value, data), call.axis(data)
    if source is None or axis is None:
        return NotImplemented
    shape = source.tensor.shape

    def contributions(kept: tuple[Tensor, ...], gradient: Tensor) -> Iterable[tuple[Source, Contribution]]:
        yield source, Materialized(reduced(call, gradient, axis, shape) * alpha)

    return call.tap(data.add_(call.constant(value), alpha=alpha), (), contributions, source)


def multiply_in_place(call: RuleCall, data: Tensor, value: Any) -> Any:
    """data *= value."""
    source, axis = broadcast_source(call, value, data), call.axis(data)
    if source is None or axis is None:
        return NotImplemented
    shape, before = source.tensor.shape, data.detach().clone()

    def contributions(kept: tuple[Tensor, ...], gradient: Tensor) -> Iterable[tuple[Source, Contribution]]:
        yield source, Materialized(reduced(call, gradient, axis, shape, factor=kept[0]))

    return call.tap(data.mul_(call.constant(value)), (before,), contributions, source)


RULES: dict[Any, Rule] = {
    torch.Tensor.__setitem__: assign,
    torch.Tensor.add_: add_in_place,
    torch.Tensor.__iadd__: add_in_place,
    torch.Tensor.mul_: multiply_in_place,
    torch.Tensor.__imul__: multiply_in_place,
}
