"""The cell of an LSTM, forward and backward written out over the positions.

The equations are those of torch.nn.LSTM's documentation, of which the gates come in the order i, f, g, o:

    z = x W_ih^T + h W_hh^T + b,  i, f, o = sigmoid(z_i, z_f, z_o),  g = tanh(z_g)
    c' = f c + i g,  u = o tanh(c'),  h' = u, or u W_hr^T with a projection

With dh and dc the gradients of h' and c' and all that follows from them:

    dc += dh o (1 - tanh(c')^2)
    dz_i = dc g i (1 - i),  dz_f = dc c f (1 - f),  dz_g = dc i (1 - g^2),  dz_o = dh tanh(c') o (1 - o)
    dc <- dc f,  dh <- dz W_hh

All factors of dc and dh are known before the backward loop, so they are computed for all positions at once, in the
buffer that the loop then turns into dz.

Axes: t position, b sequence, i input, h hidden, p output of the layer.
References: Hochreiter and Schmidhuber, Long Short-Term Memory, 1997; Sak et al. 2014, arXiv:1402.1128 (projection).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpdl.per_sample.tape.recurrent_layer import Cell, Kept, WayBack
from dpdl.per_sample.tape.recurrent_steps import Steps
from dpdl.per_sample.tape.recurrent_weights import Weights

__all__ = ["LSTMCell"]

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


@dataclass(frozen=True)
class LSTMCell(Cell):
    """Long short-term memory; its states are its output h, [b, p], and c, [b, h]."""

    def forward(
        self, rows: Tensor, first: Sequence[Tensor], weights: Weights, steps: Steps
    ) -> tuple[tuple[Tensor, ...], Kept]:
        """See `Cell`."""
        gates = rows.new_empty((len(rows), len(weights.input)))  # [rows, 4h]: z, activated by the loop
        h, c = (steps.carry(state) for state in first)
        tanh_c = torch.empty_like(c.rows)
        output = h.rows if weights.projection is None else torch.empty_like(c.rows)  # u

        by_gate = gates.view(len(gates), 4, c.rows.shape[1])
        plan = list(
            zip(
                steps.in_order(gates),
                steps.in_order(by_gate[:, :2]),
                *(steps.in_order(by_gate[:, gate]) for gate in range(4)),
                *(steps.in_order(each) for each in (h.previous, c.previous, h.rows, c.rows, tanh_c, output)),
                strict=True,
            )
        )
        hidden, biases = weights.hidden.t(), weights.biases
        projection = None if weights.projection is None else weights.projection.t()
        for block, x, z_block in zip(steps.blocks(), steps.in_blocks(rows), steps.in_blocks(gates), strict=True):
            weights.pre_activate(x, biases, z_block)
            for step in block:
                z, i_and_f, i, f, g, o, h_before, c_before, h_after, c_after, tanh, u = plan[step]
                z.addmm_(h_before, hidden)
                i_and_f.sigmoid_()
                g.tanh_()
                o.sigmoid_()
                torch.mul(f, c_before, out=c_after).addcmul_(i, g)
                torch.tanh(c_after, out=tanh)
                torch.mul(o, tanh, out=u)
                if projection is not None:
                    torch.mm(u, projection, out=h_after)
                h.hand_on(step)
                c.hand_on(step)
        return (h.rows, c.rows), (gates, h.previous, c.previous, tanh_c)

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
        gates, h_before, c_before, tanh_c = kept
        d_gates, dc_over_dh = torch.empty_like(gates), torch.empty_like(tanh_c)
        projection = weights.projection
        d_projected = None if projection is None else torch.empty_like(h_before)
        d_h, d_c = steps.running(d_last[0], h_before), steps.running(d_last[1], c_before)

        gate_shape = (len(gates), 4, c_before.shape[1])
        by_gate, d_by_gate = gates.view(gate_shape), d_gates.view(gate_shape)
        blocks = list(
            zip(
                steps.blocks(),
                *(steps.in_blocks(each) for each in (by_gate, d_by_gate, d_gates, c_before, tanh_c, dc_over_dh)),
                strict=True,
            )
        )
        plan = list(
            zip(
                steps.outputs_in_order(d_outputs),
                [None] * len(steps.sizes) if d_projected is None else steps.in_order(d_projected),
                *(steps.in_order(each) for each in (dc_over_dh, by_gate[:, 1], d_gates)),
                *(steps.in_order(each) for each in (d_by_gate[:, :3], d_by_gate[:, 3])),
                *(steps.alive(each) for each in (d_h, d_c, d_c.unsqueeze(1))),
                strict=True,
            )
        )
        d_input_blocks = None if d_inputs is None else steps.in_blocks(d_inputs)
        for number, (block, gates_here, factors, d_z_block, c, tanh, carries) in reversed(list(enumerate(blocks))):
            i, f, g, o = gates_here.unbind(1)
            _sigmoid_backward(g, i, grad_input=factors[:, 0])
            _sigmoid_backward(c, f, grad_input=factors[:, 1])
            _tanh_backward(i, g, grad_input=factors[:, 2])
            _sigmoid_backward(tanh, o, grad_input=factors[:, 3])
            _tanh_backward(o, tanh, grad_input=carries)
            for step in reversed(block):
                d_output, d_projection, carry, forget, d_z, d_ifg, d_o, dh, dc, dc_for_three = plan[step]
                if d_output is not None:
                    dh.add_(d_output)
                du = dh
                if projection is not None and d_projection is not None:
                    d_projection.copy_(dh)
                    du = torch.mm(dh, projection)
                dc.addcmul_(du, carry)
                d_ifg.mul_(dc_for_three)
                d_o.mul_(du)
                dc.mul_(forget)
                if step > 0 or need_first:
                    torch.mm(d_z, weights.hidden, out=dh)
            if d_input_blocks is not None:
                torch.mm(d_z_block, weights.input, out=d_input_blocks[number])

        projected = None if d_projected is None else (by_gate[:, 3] * tanh_c, d_projected)
        return WayBack(d_first=(d_h, d_c), before=h_before, d_gates=d_gates, projected=projected)
