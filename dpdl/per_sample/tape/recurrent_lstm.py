"""One layer and direction of an LSTM, forward and backward written out over the positions.

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

from typing import Any

import torch
from torch import Tensor

from dpdl.per_sample.tape.recurrent_autocast import backward_pass
from dpdl.per_sample.tape.recurrent_steps import Steps
from dpdl.per_sample.tape.recurrent_weights import OnProducts, Weights

__all__ = ["LSTMLayer"]

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class LSTMLayer(torch.autograd.Function):
    """`apply(inputs, h, c, anchor, weights, steps, on_products)` gives (outputs, last h, last c).

    Inputs and outputs are shaped as `Steps.shaped`; h is [b, p], c is [b, h]. The anchor is any tensor that
    requires grad: it makes autograd call the backward pass whether or not the inputs need a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        first_h: Tensor,
        first_c: Tensor,
        anchor: Tensor,
        weights: Weights,
        steps: Steps,
        on_products: OnProducts,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, last h and last c, keeping what the backward pass needs."""
        rows = steps.flat(inputs)
        gates = rows.new_empty((len(rows), len(weights.input)))  # [rows, 4h]: z, activated by the loop
        h, c = steps.carry(first_h), steps.carry(first_c)
        tanh_c = torch.empty_like(c.rows)
        output = h.rows if weights.projection is None else torch.empty_like(c.rows)  # u

        by_gate = gates.view(len(gates), 4, first_c.shape[1])
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
                torch.mul(f, c_before, out=c_after)
                c_after.addcmul_(i, g)
                torch.tanh(c_after, out=tanh)
                torch.mul(o, tanh, out=u)
                if projection is not None:
                    torch.mm(u, projection, out=h_after)
                h.hand_on(step)
                c.hand_on(step)

        ctx.save_for_backward(
            inputs, gates, h.previous, c.previous, tanh_c, weights.input, weights.hidden, weights.projection
        )
        ctx.weights, ctx.steps, ctx.on_products = weights, steps, on_products
        ctx.set_materialize_grads(False)
        return steps.shaped(h.rows), steps.last(h.rows), steps.last(c.rows)

    @staticmethod
    @backward_pass
    def backward(
        ctx: Any, d_outputs: Tensor | None, d_last_h: Tensor | None, d_last_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of inputs and first states; the weights\' go out as products."""
        inputs, gates, h_before, c_before, tanh_c, w_input, w_hidden, w_projection = ctx.saved_tensors
        steps: Steps = ctx.steps
        need_inputs, need_h, need_c = ctx.needs_input_grad[:3]
        d_gates, dc_over_dh = torch.empty_like(gates), torch.empty_like(tanh_c)
        d_projected = None if w_projection is None else torch.empty_like(h_before)
        d_h, d_c = steps.running(d_last_h, h_before), steps.running(d_last_c, c_before)
        d_inputs = gates.new_empty((len(gates), w_input.shape[1])) if need_inputs else None

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
                if d_projection is not None:
                    d_projection.copy_(dh)
                    du = torch.mm(dh, w_projection)
                dc.addcmul_(du, carry)
                d_ifg.mul_(dc_for_three)
                d_o.mul_(du)
                dc.mul_(forget)
                if step > 0 or need_h:
                    torch.mm(d_z, w_hidden, out=dh)
            if d_input_blocks is not None:
                torch.mm(d_z_block, w_input, out=d_input_blocks[number])

        g_gates = steps.padded(d_gates)
        weights: Weights = ctx.weights
        weights.report(ctx.on_products, (steps.inputs(inputs), g_gates), (steps.padded(h_before), g_gates))
        if d_projected is not None:
            weights.report_projection(ctx.on_products, steps.padded(by_gate[:, 3] * tanh_c), steps.padded(d_projected))
        return (
            None if d_inputs is None else steps.shaped(d_inputs),
            d_h if need_h else None,
            d_c if need_c else None,
            None,
            None,
            None,
            None,
        )
