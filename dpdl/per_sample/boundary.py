"""The border between the private model and the user's loss: outputs go out, their gradients come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpdl.execution import LossReduction
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.engine import Engine, ForwardPass, FrozenCall, PerSampleGradients, is_differentiable
from dpdl.per_sample.layout import OutputLayout

__all__ = ["OnBackward", "forward_with_boundary"]

OnBackward = Callable[[Iterator[PerSampleGradients]], None]


def forward_with_boundary(
    engine: Engine,
    batch: ExampleBatch,
    trainable: Mapping[str, Tensor],
    *,
    loss_reduction: LossReduction,
    on_backward: OnBackward,
) -> tuple[Any, OutputLayout]:
    """Run the model and return its output; a backward through that output calls `on_backward`.

    Args:
        engine: who computes.
        batch: N examples; N may be 0.
        trainable: parameters by name.
        loss_reduction: how the loss that will be built on the output combines examples. For a mean,
            what comes back is multiplied by N, so that gradients are of each example's own loss.
        on_backward: receives the per-sample gradients, in parts, when the output's gradients are known.

    Returns:
        The model's output, as the model returns it for the whole batch. A scalar that the model computes
        (a loss inside the model) is combined over examples by `loss_reduction`. And its layout.
    """
    forward = engine.forward(batch, trainable) if batch.size else _empty_forward(engine, batch, trainable)
    differentiable = [i for i, leaf in enumerate(forward.outputs) if is_differentiable(leaf)]
    scale = batch.size if loss_reduction == "mean" else 1

    def gradients_arrived(received: tuple[Tensor, ...]) -> None:
        cotangents = {i: c * scale for i, c in zip(differentiable, received, strict=True)}
        on_backward(forward_pull_back(cotangents))

    forward_pull_back = forward.pull_back  # the closure must not hold the outputs: they hold the closure
    layout, outputs = forward.layout, list(forward.outputs)
    del forward
    anchor = torch.zeros((), requires_grad=True)  # makes autograd call us; nothing flows into it
    with torch.enable_grad():
        attached = _Boundary.apply(anchor, [outputs[i] for i in differentiable], gradients_arrived)
        for i, tensor in zip(differentiable, attached, strict=True):
            outputs[i] = tensor
        for i, axis in enumerate(layout.axes):
            if axis is None and isinstance(outputs[i], Tensor):
                mean = loss_reduction == "mean" and batch.size and is_differentiable(outputs[i])
                outputs[i] = outputs[i].mean(0) if mean else outputs[i].sum(0)
    return layout.assemble(outputs), layout


class _Boundary(torch.autograd.Function):
    """Identity forward; backward hands over the outputs' gradients and ends there."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, outputs: list[Tensor], arrived: Callable[[tuple[Tensor, ...]], None]
    ) -> tuple[Tensor, ...]:
        ctx.arrived = arrived
        # A view that leaves a custom function could not be written to in place by the loss.
        return tuple(output.clone() if output._is_view() else output for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, None, None]:
        ctx.arrived(cotangents)
        return None, None, None


def _empty_forward(engine: Engine, batch: ExampleBatch, trainable: Mapping[str, Tensor]) -> ForwardPass:
    """Outputs for no examples, shaped as for one: many models cannot be run on an empty batch."""
    call = FrozenCall(engine.module, trainable)
    one = batch.zero_rows(1)
    layout = engine.layout_of(trainable, one)
    with torch.no_grad():
        leaves = layout.leaves(call(trainable, one))
    outputs = [
        leaf if not isinstance(leaf, Tensor) else leaf.new_empty(0) if axis is None else leaf.narrow(axis, 0, 0).clone()
        for leaf, axis in zip(leaves, layout.axes, strict=True)
    ]
    return ForwardPass(outputs=outputs, layout=layout, pull_back=_no_gradients)


def _no_gradients(cotangents: Mapping[int, Tensor]) -> Iterator[PerSampleGradients]:
    return iter(())
