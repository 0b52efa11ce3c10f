"""One layer and direction of a tanh, relu or GRU network, forward and backward written out over the positions.

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

from typing import Any, Literal

import torch
from torch import Tensor

from dpdl.per_sample.tape.recurrent_autocast import backward_pass
from dpdl.per_sample.tape.recurrent_steps import Steps
from dpdl.per_sample.tape.recurrent_weights import OnProducts, Weights

__all__ = ["GRULayer", "SimpleLayer"]

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_relu_backward = torch.ops.aten.threshold_backward.grad_input


class SimpleLayer(torch.autograd.Function):
    """`apply(inputs, h, anchor, weights, steps, activation, on_products)` gives (outputs, last h).

    Inputs and outputs are shaped as `Steps.shaped`; h is [b, h]. The anchor is any tensor that requires grad: it
    makes autograd call the backward pass whether or not the inputs need a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        first: Tensor,
        anchor: Tensor,
        weights: Weights,
        steps: Steps,
        activation: Literal["tanh", "relu"],
        on_products: OnProducts,
    ) -> tuple[Tensor, Tensor]:
        """Outputs and last h, keeping what the backward pass needs."""
        h = steps.carry(first)
        hidden, biases = weights.hidden.t(), weights.biases
        activate = torch.tanh_ if activation == "tanh" else torch.relu_
        plan = list(zip(steps.in_order(h.previous), steps.in_order(h.rows), strict=True))
        inputs_and_rows = steps.in_blocks(steps.flat(inputs)), steps.in_blocks(h.rows)
        for block, x, z_block in zip(steps.blocks(), *inputs_and_rows, strict=True):
            weights.pre_activate(x, biases, z_block)
            for step in block:
                before, after = plan[step]
                activate(after.addmm_(before, hidden))
                h.hand_on(step)
        ctx.save_for_backward(inputs, h.previous, h.rows, weights.input, weights.hidden)
        ctx.weights, ctx.steps, ctx.activation, ctx.on_products = weights, steps, activation, on_products
        ctx.set_materialize_grads(False)
        return steps.shaped(h.rows), steps.last(h.rows)

    @staticmethod
    @backward_pass
    def backward(ctx: Any, d_outputs: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of inputs and first states; the weights\' go out as products."""
        inputs, before, after, w_input, w_hidden = ctx.saved_tensors
        steps: Steps = ctx.steps
        need_inputs, need_h = ctx.needs_input_grad[:2]
        d_rows = torch.empty_like(after)
        d_h = steps.running(d_last, after)
        tanh = ctx.activation == "tanh"
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
            if step > 0 or need_h:
                torch.mm(d_z, w_hidden, out=dh)
        g = steps.padded(d_rows)
        weights: Weights = ctx.weights
        weights.report(ctx.on_products, (steps.inputs(inputs), g), (steps.padded(before), g))
        d_inputs = torch.mm(d_rows, w_input) if need_inputs else None
        return (
            None if d_inputs is None else steps.shaped(d_inputs),
            d_h if need_h else None,
            None,
            None,
            None,
            None,
            None,
        )


class GRULayer(torch.autograd.Function):
    """`apply(inputs, h, anchor, weights, steps, on_products)` gives (outputs, last h); shapes as in SimpleLayer."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        first: Tensor,
        anchor: Tensor,
        weights: Weights,
        steps: Steps,
        on_products: OnProducts,
    ) -> tuple[Tensor, Tensor]:
        """Outputs and last h, keeping what the backward pass needs."""
        size = first.shape[1]
        bias, candidate_bias = weights.input_bias, None
        if bias is not None and weights.hidden_bias is not None:
            candidate_bias = weights.hidden_bias[2 * size :]  # not added but multiplied by r first
            bias = bias.clone()
            bias[: 2 * size] += weights.hidden_bias[: 2 * size]
        rows = steps.flat(inputs)
        gates = rows.new_empty((len(rows), 3 * size))  # x W_i^T + b, turned into r, z, n by the loop
        h = steps.carry(first)
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
        ctx.save_for_backward(inputs, gates, h.previous, memory, weights.input, weights.hidden)
        ctx.weights, ctx.steps, ctx.on_products = weights, steps, on_products
        ctx.set_materialize_grads(False)
        return steps.shaped(h.rows), steps.last(h.rows)

    @staticmethod
    @backward_pass
    def backward(ctx: Any, d_outputs: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of inputs and first states; the weights\' go out as products."""
        inputs, gates, before, memory, w_input, w_hidden = ctx.saved_tensors
        steps: Steps = ctx.steps
        size = before.shape[1]
        need_inputs, need_h = ctx.needs_input_grad[:2]
        # In the order n, r, z, m: the hidden weights' gradient (r, z, m) is then one block, as the loop needs it.
        products = gates.new_empty((len(gates), 4 * size))
        by_gate, by_product = gates.view(len(gates), 3, size), products.view(len(gates), 4, size)
        d_h = steps.running(d_last, before)
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
                if step > 0 or need_h:
                    dh.mul_(keep).addmm_(d_hidden, w_hidden)
        d_gates = torch.cat([products[:, size : 3 * size], products[:, :size]], 1)
        weights: Weights = ctx.weights
        weights.report(
            ctx.on_products,
            (steps.inputs(inputs), steps.padded(d_gates)),
            (steps.padded(before), steps.padded(products[:, size:])),
        )
        d_inputs = torch.mm(d_gates, w_input) if need_inputs else None
        return (
            None if d_inputs is None else steps.shaped(d_inputs),
            d_h if need_h else None,
            None,
            None,
            None,
            None,
        )
