"""One layer and direction of a recurrent network as a node of autograd's graph, whatever its cell.

A cell knows its equations, and walks through the positions and back. This node keeps what the way back needs, and
reports what the weights receive.

Axes: t position, b sequence, i input, p output of the layer, o output of a weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpdl.per_sample.tape.recurrent_autocast import backward_pass
from dpdl.per_sample.tape.recurrent_steps import Steps
from dpdl.per_sample.tape.recurrent_weights import OnProducts, Products, Weights

__all__ = ["Cell", "Kept", "Layer", "WayBack"]

Kept = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class WayBack:
    """What a cell's backward pass leaves.

    Attributes:
        d_first: gradients of the first states, [b, features] each.
        before: output before each row's step, [rows, p], by which the hidden weight was multiplied.
        d_gates: gradient of what the input weight produces, [rows, o].
        d_hidden_gates: of what the hidden weight produces; None: the same.
        projected: of an LSTM with a projection: what was projected, and the gradient of the result.
    """

    d_first: tuple[Tensor, ...]
    before: Tensor
    d_gates: Tensor
    d_hidden_gates: Tensor | None = None
    projected: tuple[Tensor, Tensor] | None = None


class Cell(ABC):
    """The equations of one kind of network. Rows are as in `Steps`."""

    @abstractmethod
    def forward(
        self, rows: Tensor, first: Sequence[Tensor], weights: Weights, steps: Steps
    ) -> tuple[tuple[Tensor, ...], Kept]:
        """The states after each row's step, [rows, features], the output first; and what `backward` needs.

        Args:
            rows: inputs, [rows, i].
            first: states before the first step, [b, features].
            weights: of this layer and direction.
            steps: the order of work.
        """

    @abstractmethod
    def backward(
        self,
        kept: Kept,
        d_outputs: Tensor | None,
        d_last: Sequence[Tensor | None],
        weights: Weights,
        steps: Steps,
        *,
        need_first: bool,
        d_inputs: Tensor | None,
    ) -> WayBack:
        """Go back through the steps.

        Args:
            kept: from `forward`.
            d_outputs: gradient of the outputs, as they were handed out.
            d_last: gradients of the last states.
            weights: of this layer and direction.
            steps: the order of work.
            need_first: whether the gradients of the first states are asked for.
            d_inputs: where to write the gradient of the inputs, [rows, i], if that is asked for.
        """


class Layer(torch.autograd.Function):
    """`apply(cell, weights, steps, on_products, anchor, inputs, *first states)` gives (outputs, *last states).

    Inputs and outputs are shaped as `Steps.shaped`; states are [b, features]. The anchor is any tensor that requires
    grad: it makes autograd call the backward pass whether or not the inputs need a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        weights: Weights,
        steps: Steps,
        on_products: OnProducts,
        anchor: Tensor,
        inputs: Tensor,
        *first: Tensor,
    ) -> tuple[Tensor, ...]:
        """Outputs and last states, keeping what the backward pass needs."""
        states, kept = cell.forward(steps.flat(inputs), first, weights, steps)
        ctx.save_for_backward(inputs, weights.input, weights.hidden, weights.projection, *kept)
        ctx.cell, ctx.weights, ctx.steps, ctx.on_products = cell, weights, steps, on_products
        ctx.set_materialize_grads(False)
        return steps.shaped(states[0]), *(steps.last(state) for state in states)

    @staticmethod
    @backward_pass
    def backward(ctx: Any, d_outputs: Tensor | None, *d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of inputs and first states; the weights' go out as products."""
        inputs, w_input, w_hidden, w_projection, *kept = ctx.saved_tensors
        weights = replace(ctx.weights, input=w_input, hidden=w_hidden, projection=w_projection)
        cell: Cell = ctx.cell
        steps: Steps = ctx.steps
        need_inputs, *need_first = ctx.needs_input_grad[5:]
        d_inputs = w_input.new_empty((steps.rows, w_input.shape[1])) if need_inputs else None
        way = cell.backward(
            tuple(kept), d_outputs, d_last, weights, steps, need_first=any(need_first), d_inputs=d_inputs
        )
        _report(way, inputs.detach(), weights, steps, ctx.on_products)  # the inputs may have a graph behind them
        return (
            *(None,) * 5,
            None if d_inputs is None else steps.shaped(d_inputs),
            *(gradient if need else None for gradient, need in zip(way.d_first, need_first, strict=True)),
        )


def _report(way: WayBack, inputs: Tensor, weights: Weights, steps: Steps, on_products: OnProducts) -> None:
    at = weights.position
    ours, hidden = (at, steps.inputs(inputs)), (at + 1, steps.padded(way.before))
    g, biases = steps.padded(way.d_gates), weights.bias_positions
    if way.d_hidden_gates is None:
        on_products(Products(g=g, operands=(ours, hidden), biases=biases))
    else:
        on_products(Products(g=g, operands=(ours,), biases=biases[:1]))
        on_products(Products(g=steps.padded(way.d_hidden_gates), operands=(hidden,), biases=biases[1:]))
    if way.projected is not None:
        a, g = (steps.padded(rows) for rows in way.projected)
        on_products(Products(g=g, operands=((weights.projection_position, a),)))
