"""From one call seen in three runs to its plan: which axis carries the examples, and in what order.

Examples that are rearranged in the batch must be rearranged in the same way in each call. Where an example has
several rows, that tells which rows are its. Where rows follow no such order (a model that sorts its batch, say) the
tape would take one example's gradient for another's, and refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpdl.per_sample.tape.batch_axis import BatchAxis, RowOrder
from dpdl.per_sample.tape.plan import CallPlan

__all__ = ["FEW", "MORE", "SeenCall", "plan_of"]

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


class _Trouble(Exception):
    """Why a call cannot be planned."""


def plan_of(few: SeenCall, more: SeenCall, rearranged: SeenCall | None, arrangement: Sequence[int]) -> CallPlan:
    """The plan of a call.

    Args:
        few, more: the call for two examples and for three.
        rearranged: for the three in the order `arrangement`; None: not to be compared.
    """
    try:
        if len(few.operands) != len(more.operands) or len(few.outputs) != len(more.outputs):
            raise _Trouble("its operands depend on how many examples there are")
        other = rearranged
        if other is not None and (len(other.operands) != len(more.operands) or len(other.outputs) != len(more.outputs)):
            raise _Trouble("its operands depend on the order of the examples")

        operands = []
        for i, (a, b, tracked) in enumerate(zip(few.operands, more.operands, more.tracked, strict=True)):
            c = None if other is None else other.operands[i]
            operands.append((b.ndim, None if tracked else _axis(a, b, c, arrangement)))
        outputs = []
        for i, (a, b) in enumerate(zip(few.outputs, more.outputs, strict=True)):
            outputs.append(_axis(a, b, None if other is None else other.outputs[i], arrangement))
    except _Trouble as trouble:
        return CallPlan(operands=(), outputs=(), trouble=str(trouble))
    return CallPlan(operands=tuple(operands), outputs=tuple(outputs))


def _axis(few: Tensor, more: Tensor, rearranged: Tensor | None, arrangement: Sequence[int]) -> BatchAxis | None:
    if few.shape == more.shape:
        return None
    if few.ndim != more.ndim:
        raise _Trouble("an operand has another number of axes for another number of examples")
    grown = [i for i in range(few.ndim) if few.shape[i] != more.shape[i]]
    position = grown[0]
    if len(grown) > 1 or few.shape[position] * MORE != more.shape[position] * FEW:
        raise _Trouble(f"shape {tuple(few.shape)} for {FEW} examples became {tuple(more.shape)} for {MORE}")
    if rearranged is None:
        return BatchAxis(position=position)
    orders: tuple[RowOrder, ...] = ("example", "inner")
    for order in orders if more.shape[position] > MORE else orders[:1]:
        axis = BatchAxis(position=position, order=order)
        if _follows(more, rearranged, axis, arrangement):
            return axis
    raise _Trouble("its rows do not follow the order of the examples")


def _follows(base: Tensor, rearranged: Tensor, axis: BatchAxis, arrangement: Sequence[int]) -> bool:
    """Whether rows are rearranged as the examples are."""
    if base.shape != rearranged.shape:
        return False
    expected = axis.to_front(base, MORE)[list(arrangement)]
    found = axis.to_front(rearranged, MORE)
    if not base.is_floating_point():
        return torch.equal(expected, found)
    finite = expected.nan_to_num(posinf=0, neginf=0)
    scale = float(finite.abs().max()) if expected.numel() else 0.0
    tolerance = max(ROUNDING, torch.finfo(base.dtype).eps ** 0.5)
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
