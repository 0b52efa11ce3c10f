"""A parameter copied for each example, where an operation has no rule: autograd then tells the copies apart.

The copies are expanded, not stored. An operation that takes data runs under vmap, so that it cannot mix examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from dpdl.per_sample.tape.batch_axis import BatchAxis
from dpdl.per_sample.tape.call import Call
from dpdl.per_sample.tape.contribution import Contribution, Materialized
from dpdl.per_sample.tape.plan import CallPlan
from dpdl.per_sample.tape.refusal import TapeRefusal
from dpdl.per_sample.tape.source import Source
from dpdl.per_sample.tape.sources import Sources

__all__ = ["ExampleCopies", "copies_of", "run_for_each_example", "spread"]

# Numbers in the one-example-at-a-time cotangents of a tensor that parameters alone were spread over the batch in.
LARGEST_SPREAD = 2**26


@dataclass(frozen=True, eq=False, kw_only=True)
class ExampleCopies:
    """A leaf of the graph that stands for a source.

    Attributes:
        source: what it is copied from.
        leaf: requires a gradient.
        to_contribution: from the leaf's gradient.
    """

    source: Source
    leaf: Tensor
    to_contribution: Callable[[Tensor], Contribution] = field(default=Materialized)


def copies_of(source: Source, examples: int) -> ExampleCopies:
    """A copy for each example, [n, *shape]; nothing is stored for it."""
    constant = source.constant
    return ExampleCopies(source=source, leaf=constant.expand(examples, *constant.shape).requires_grad_())


def run_for_each_example(
    call: Call, plan: CallPlan, sources: Sources, examples: int
) -> tuple[Any, list[ExampleCopies]]:
    """The call's result with a copy of each source for each example, and the copies.

    Raises:
        TapeRefusal: the operation writes to its operands, or cannot run under vmap.
    """
    name = getattr(call.function, "__name__", "")
    if (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__"):
        raise TapeRefusal(f"{call} writes to its operand in place, and no rule knows it")
    leaves, spec = tree_flatten((call.args, dict(call.kwargs)))
    copies: list[ExampleCopies] = []
    mapped: list[Tensor] = []
    places: dict[int, tuple[int, BatchAxis | None]] = {}  # leaf position to position in `mapped`
    axes = iter(plan.operands)
    for position, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        _, axis = next(axes)
        source = sources.get(id(leaf))
        if source is not None:
            copies.append(copies_of(source, examples))
            places[position] = (len(mapped), None)
            mapped.append(copies[-1].leaf)
        elif axis is not None:
            places[position] = (len(mapped), axis)
            mapped.append(axis.to_front(leaf, examples))
    structure: list[Any] = []

    def for_one(*rows: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for position, (index, axis) in places.items():
            filled[position] = rows[index] if axis is None else rows[index].movedim(0, axis.position)
        args, kwargs = tree_unflatten(filled, spec)
        found, found_spec = tree_flatten(call.function(*args, **kwargs))
        structure[:] = [found_spec, len(found)]
        if not all(isinstance(t, Tensor) for t in found) or len(found) != len(plan.outputs):
            raise TapeRefusal(f"{call} returns something else than tensors")
        return tuple(
            t if axis is None else t.movedim(axis.position, 0) for t, axis in zip(found, plan.outputs, strict=True)
        )

    if any(axis is None for axis in plan.outputs):
        raise TapeRefusal(f"{call} has an output that does not carry the examples")
    try:
        found = vmap(for_one, randomness="different")(*mapped)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # whatever vmap meets in an operation
        reason = str(error).split("\n")[0]
        raise TapeRefusal(f"{call} has no rule, and vmap cannot run it: {reason}") from error
    results = [axis.from_front(t) for t, axis in zip(found, plan.outputs, strict=True) if axis is not None]
    return tree_unflatten(results, structure[0]), copies


def spread(call: Call, plan: CallPlan, result: Any, examples: int) -> tuple[Any, list[ExampleCopies]]:
    """What parameters alone have filled a batch with (a class token expanded to it, say), as leaves.

    Raises:
        TapeRefusal: the result is not one tensor, or too large to be pulled back example by example.
    """
    outputs = tree_leaves(result)
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or plan.outputs[0] is None:
        raise TapeRefusal(f"{call} spreads parameters over the batch in several tensors")
    output, axis = outputs[0], plan.outputs[0]
    if not output.requires_grad:
        return result, []
    leaf = output.detach().clone().requires_grad_()
    parent = call.sources[0]
    name = getattr(call.function, "__name__", "")
    if name in ("expand", "expand_as", "broadcast_to") and len(call.sources) == 1:
        shape = parent.tensor.shape
        made = ExampleCopies(
            source=parent, leaf=leaf, to_contribution=lambda g: Materialized(_unexpanded(g, axis, shape, examples))
        )
    else:
        if examples * output.numel() > LARGEST_SPREAD:
            raise TapeRefusal(f"{call} spreads parameters over the batch, in a tensor of shape {tuple(output.shape)}")
        parameters = tuple(dict.fromkeys(n for source in call.sources for n in source.parameters))
        spread_out = Source(
            key=(call.name, "spread"),
            tensor=output,
            parameters=parameters,
            moved=False,
            version=output._version,
            rounded=True,
        )
        made = ExampleCopies(
            source=spread_out, leaf=leaf, to_contribution=lambda g: Materialized(_one_at_a_time(g, axis, examples))
        )
    tapped = leaf.view_as(leaf)  # not a leaf: later operations may write to it in place
    return tree_unflatten([tapped], tree_flatten(result)[1]), [made]


def _unexpanded(gradient: Tensor, axis: BatchAxis, shape: torch.Size, examples: int) -> Tensor:
    """[n, *shape] from the gradient of `shape` expanded to the batch on `axis`."""
    g = axis.to_front(gradient, examples)  # [n, k, ...]
    sizes = [1] * (gradient.ndim - len(shape)) + list(shape)
    del sizes[axis.position]
    along = [1] + [2 + i for i, (own, full) in enumerate(zip(sizes, g.shape[2:], strict=True)) if own != full]
    return g.sum(along).reshape(examples, *shape)


def _one_at_a_time(gradient: Tensor, axis: BatchAxis, examples: int) -> Tensor:
    """[n, *gradient.shape]: for each example the gradient where its rows are, and zero elsewhere."""
    g = axis.to_front(gradient, examples)
    alone = torch.eye(examples, dtype=g.dtype, device=g.device)
    parts = alone.view(examples, examples, *[1] * (g.ndim - 1)) * g.nan_to_num()
    parts.diagonal(dim1=0, dim2=1).copy_(g.movedim(0, -1))
    return torch.stack([axis.from_front(part) for part in parts])
