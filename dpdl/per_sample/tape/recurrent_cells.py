"""The cells of tanh, relu and GRU networks, forward and backward written out over the positions.

The equations are those of torch.nn.RNN's and torch.nn.GRU's documentation:

    tanh, relu   h' = act(x W_ih^T + h W_hh^T + b)

    GRU          r, z = sigmoid(x W_i^T + h W_h^T + b),  m = h W_hn^T + b_hn,  n = tanh(x W_in^T + b_in + r m)
                 h' = (1 - z) n + z h

The GRU's gradients with respect to what its weights produce are all multiples of dh, the gradient of h', with
factors that are known before the backward loop:

    dn = dh (1 - z) (1 - n^2),  dz = dh (h - n) z (1 - z),  dr = dn m r (1 - r),  dm = dn r
    dh <- dh z + [dr, dz, dm] W_hh

so that g is (dr, dz, dn) for the input weights, but (dr, dz, dm) for the hidden ones.

Axes: t position, b sequence, i input, h hidden. References: Elman 1990; Cho et al. 2014, arXiv:1406.1078.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dpdl.per_sample.tape.recurrent_layer import Cell, Kept, WayBack
from dpdl.per_sample.tape.recurrent_steps import Steps
from dpdl.per_sample.tape.recurrent_weights import Weights

__all__ = ["GRUCell", "SimpleCell"]

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_relu_backward = torch.ops.aten.threshold_backward.grad_input


@dataclass(frozen=True, kw_only=True)
class SimpleCell(Cell):
    """An Elman network; its state is its output.

    Args:
        activation: of the output.
    """

    activation: Literal["tanh", "relu"]

    def forward(
        self, rows: Tensor, first: Sequence[Tensor], weights: Weights, steps: Steps
    ) -> tuple[tuple[Tensor, ...], Kept]:
        """See `Cell`."""
        h = steps.carry(first[0])
        hidden, biases = weights.hidden.t(), weights.biases
        activate = torch.tanh_ if self.activation == "tanh" else torch.relu_
        plan = list(zip(steps.in_order(h.previous), steps.in_order(h.rows), strict=True))
        for block, x, z_block in zip(steps.blocks(), steps.in_blocks(rows), steps.in_blocks(h.rows), strict=True):
            weights.pre_activate(x, biases, z_block)
            for step in block:
                before, after = plan[step]
                activate(after.addmm_(before, hidden))
                h.hand_on(step)
        return (h.rows,), (h.previous, h.rows)

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
        """See `Cell`."""
        before, after = kept
        d_rows = torch.empty_like(after)
        d_h = steps.running(d_last[0], after)
        tanh = self.activation == "tanh"
        plan = list(
            zip(
                steps.outputs_in_order(d_outputs),
                *(steps.in_order(each) for each in (after, d_rows)),
                steps.alive(d_h),
                strict=True,
            )
        )
        for step, (d_output, h, d_z, dh) in reversed(list(enumerate(plan))):
            if d_output is not None:
                dh.add_(d_output)
            if tanh:
                _tanh_backward(dh, h, grad_input=d_z)
            else:
                _relu_backward(dh, h, 0, grad_input=d_z)
            if step > 0 or need_first:
                torch.mm(d_z, weights.hidden, out=dh)
        if d_inputs is not None:
            torch.mm(d_rows, weights.input, out=d_inputs)
        return WayBack(d_first=(d_h,), before=before, d_gates=d_rows)


@dataclass(frozen=True)
class GRUCell(Cell):
    """Gated recurrent units; their state is their output."""

    def forward(
        self, rows: Tensor, first: Sequence[Tensor], weights: Weights, steps: Steps
    ) -> tuple[tuple[Tensor, ...], Kept]:
        """See `Cell`."""
        size = first[0].shape[1]
        bias, candidate_bias = weights.input_bias, None
        if bias is not None and weights.hidden_bias is not None:
            candidate_bias = weights.hidden_bias[2 * size :]  # not added but multiplied by r first
            bias = bias.clone()
            bias[: 2 * size] += weights.hidden_bias[: 2 * size]
        gates = rows.new_empty((len(rows), 3 * size))  # x W_i^T + b, turned into r, z, n by the loop
        h = steps.carry(first[0])
        memory = torch.empty_like(h.rows)  # m

        by_gate = gates.view(len(gates), 3, size)
        plan = list(
            zip(
                steps.in_order(gates[:, : 2 * size]),
                *(steps.in_order(by_gate[:, gate]) for gate in range(3)),
                *(steps.in_order(each) for each in (h.previous, h.rows, memory)),
                strict=True,
            )
        )
        hidden_gates, hidden_candidate = weights.hidden[: 2 * size].t(), weights.hidden[2 * size :].t()
        for block, x, gates_block in zip(steps.blocks(), steps.in_blocks(rows), steps.in_blocks(gates), strict=True):
            weights.pre_activate(x, bias, gates_block)
            for step in block:
                r_and_z, r, z, n, before, after, m = plan[step]
                r_and_z.addmm_(before, hidden_gates).sigmoid_()
                if candidate_bias is None:
                    torch.mm(before, hidden_candidate, out=m)
                else:
                    torch.addmm(candidate_bias, before, hidden_candidate, out=m)
                n.addcmul_(r, m).tanh_()
                torch.lerp(n, before, z, out=after)
                h.hand_on(step)
        return (h.rows,), (gates, h.previous, memory)

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
        """See `Cell`."""
        gates, before, memory = kept
        size = before.shape[1]
        # In the order n, r, z, m: the hidden weights' gradient (r, z, m) is then one block, as the loop needs it.
        products = gates.new_empty((len(gates), 4 * size))
        by_gate, by_product = gates.view(len(gates), 3, size), products.view(len(gates), 4, size)
        d_h = steps.running(d_last[0], before)
        blocks = list(
            zip(
                steps.blocks(),
                *(steps.in_blocks(each) for each in (by_gate, by_product, before, memory)),
                strict=True,
            )
        )
        plan = list(
            zip(
                steps.outputs_in_order(d_outputs),
                *(steps.in_order(each) for each in (by_gate[:, 1], by_product, products[:, size:])),
                *(steps.alive(each) for each in (d_h, d_h.unsqueeze(1))),
                strict=True,
            )
        )
        for block, gates_here, factors, h, m in reversed(blocks):
            r, z, n = gates_here.unbind(1)
            _tanh_backward(1 - z, n, grad_input=factors[:, 0])
            torch.mul(factors[:, 0], r, out=factors[:, 3])
            _sigmoid_backward(factors[:, 0] * m, r, grad_input=factors[:, 1])
            _sigmoid_backward(h - n, z, grad_input=factors[:, 2])
            for step in reversed(block):
                d_output, keep, all_four, d_hidden, dh, dh_for_four = plan[step]
                if d_output is not None:
                    dh.add_(d_output)
                all_four.mul_(dh_for_four)
                if step > 0 or need_first:
                    dh.mul_(keep).addmm_(d_hidden, weights.hidden)
        d_gates = torch.cat([products[:, size : 3 * size], products[:, :size]], 1)
        if d_inputs is not None:
            torch.mm(d_gates, weights.input, out=d_inputs)
        return WayBack(d_first=(d_h,), before=before, d_gates=d_gates, d_hidden_gates=products[:, size:])
