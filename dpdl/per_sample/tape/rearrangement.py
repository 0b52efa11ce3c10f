"""From one call seen in three runs to its plan: which axis carries the examples, and in what order.

The third run has the examples of the second in other places, or one of them exchanged for another. Rows of an example
must be found in its new place, unchanged, in every call. Where an example has several rows, that tells which are its.
Where rows follow no such order (a model that sorts its batch, say) the tape would take one example's gradient for
another's, and refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpdl.per_sample.tape.batch_axis import BatchAxis, RowOrder
from dpdl.per_sample.tape.plan import CallPlan

__all__ = ["FEW", "MORE", "Origin", "SeenCall", "outputs_follow", "plan_of"]

FEW, MORE = 2, 3  # examples in the first run, and in the others
# Relative difference of values that are the same but for the order of summation in a kernel.
ROUNDING = 1e-4


@dataclass(frozen=True, kw_only=True)
class SeenCall:
    """One call: its tensors before and after.

    Attributes:
        operands: tensors among its arguments.
        outputs: tensors that it gave.
        tracked: which operands depend on parameters alone.
    """

    operands: list[Tensor]
    outputs: list[Tensor]
    tracked: list[bool]


# Which example of the second run is at each position of the third; None: one that was not there.
Origin = Sequence[int | None]


class _Trouble(Exception):
    """Why a call cannot be planned."""


class _Unseen(Exception):
    """Which rows are whose could not be seen."""


def plan_of(few: SeenCall, more: SeenCall, changed: SeenCall | None, origin: Origin) -> CallPlan | None:
    """The plan of a call; None if which rows are whose could not be seen.

    Args:
        few, more: the call for two examples and for three.
        changed: for three, those of `origin`; None: it cannot be compared.
    """
    try:
        if len(few.operands) != len(more.operands) or len(few.outputs) != len(more.outputs):
            raise _Trouble("its operands depend on how many examples there are")
        if changed is not None and (
            len(changed.operands) != len(more.operands) or len(changed.outputs) != len(more.outputs)
        ):
            raise _Trouble("its operands depend on the order of the examples")
        operands = []
        for i, (a, b, tracked) in enumerate(zip(few.operands, more.operands, more.tracked, strict=True)):
            c = None if changed is None else changed.operands[i]
            operands.append((b.ndim, None if tracked else _axis(a, b, c, origin)))
        outputs = []
        for i, (a, b) in enumerate(zip(few.outputs, more.outputs, strict=True)):
            outputs.append(_axis(a, b, None if changed is None else changed.outputs[i], origin))
    except _Trouble as trouble:
        return CallPlan(operands=(), outputs=(), trouble=str(trouble))
    except _Unseen:
        return None
    return CallPlan(operands=tuple(operands), outputs=tuple(outputs))


def outputs_follow(few: Sequence[Tensor], more: Sequence[Tensor], changed: Sequence[Tensor], origin: Origin) -> bool:
    """Whether what a model gives changes with its examples and in no other way, where it carries examples."""
    for a, b, c in zip(few, more, changed, strict=False):
        try:
            position = _position(a, b)
        except _Trouble:
            continue  # not one output an example; nothing can be trained on it
        if position is not None and not _follows(b, c, BatchAxis(position=position), origin):
            return False
    return True


def _axis(few: Tensor, more: Tensor, changed: Tensor | None, origin: Origin) -> BatchAxis | None:
    position = _position(few, more)
    if position is None:
        return None
    several = more.shape[position] > MORE
    if changed is None:
        if several:
            raise _Unseen
        return BatchAxis(position=position, each=1)
    orders: tuple[RowOrder, ...] = ("example", "inner")
    for order in orders if several else orders[:1]:
        axis = BatchAxis(position=position, order=order, each=more.shape[position] // MORE)
        if _follows(more, changed, axis, origin):
            return axis
    raise _Trouble("its rows do not follow the order of the examples")


def _position(few: Tensor, more: Tensor) -> int | None:
    """The axis that grew with the examples."""
    if few.shape == more.shape:
        return None
    if few.ndim != more.ndim:
        raise _Trouble("an operand has another number of axes for another number of examples")
    grown = [i for i in range(few.ndim) if few.shape[i] != more.shape[i]]
    if len(grown) > 1 or few.shape[grown[0]] * MORE != more.shape[grown[0]] * FEW:
        raise _Trouble(f"shape {tuple(few.shape)} for {FEW} examples became {tuple(more.shape)} for {MORE}")
    return grown[0]


def _follows(base: Tensor, changed: Tensor, axis: BatchAxis, origin: Origin) -> bool:
    """Whether the rows of examples that are in both runs are the same."""
    if base.shape != changed.shape:
        return False
    there = [p for p, example in enumerate(origin) if example is not None]
    expected = axis.to_front(base, MORE)[[example for example in origin if example is not None]]
    found = axis.to_front(changed, MORE)[there]
    if not base.is_floating_point():
        return torch.equal(expected, found)
    finite = expected.nan_to_num(posinf=0, neginf=0)
    scale = float(finite.abs().max()) if expected.numel() else 0.0
    tolerance = max(ROUNDING, torch.finfo(base.dtype).eps ** 0.5)
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
