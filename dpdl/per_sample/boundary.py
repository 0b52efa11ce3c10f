"""The border between the private model and the user's loss: outputs go out, their gradients come back.

A forward pass becomes a `Passage`. Each backward adds the outputs' gradients to it, as often as the user calls
backward; the way back through the model is taken once, when the step asks for it. Gradients are linear in those of
the outputs, so the per-sample gradient is the same as if each backward had gone all the way, and it is whole when
it is clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpdl.errors import StepError
from dpdl.execution import LossReduction
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.engine import Engine, ForwardPass, FrozenCall, PerSampleGradients, is_differentiable
from dpdl.per_sample.layout import OutputLayout

__all__ = ["OnBackward", "Passage", "forward_with_boundary", "visit_gradients"]


class Passage:
    """One forward pass between its outputs and the step: adds up what backwards bring.

    Args:
        engine: who ran it.
        forward: the pass. Its outputs are let go: they hold the graph that holds this object.
        trainable: names of the parameters that it was run for.
        size: N.
        divisor: by what the loss divides each example's own loss: N for a mean, 1 for a sum.
        on_used: called when the way back is about to be taken.
    """

    def __init__(
        self,
        engine: Engine,
        forward: ForwardPass,
        *,
        trainable: frozenset[str],
        size: int,
        divisor: int,
        on_used: Callable[[], None],
    ) -> None:
        self.engine = engine
        self.trainable = trainable
        self.size = size
        self.divisor = divisor
        self._differentiable = [i for i, leaf in enumerate(forward.outputs) if is_differentiable(leaf)]
        self._forward: ForwardPass | None = replace(forward, outputs=[])
        self._cotangents: dict[int, tuple[Tensor, int]] = {}  # not copied: with their versions
        self._on_used = on_used

    @property
    def is_used_up(self) -> bool:
        """Whether its way back was taken."""
        return self._forward is None

    def add(self, received: tuple[Tensor, ...]) -> None:
        """The differentiable outputs' gradients, from one backward."""
        for i, cotangent in zip(self._differentiable, received, strict=True):
            earlier = self._cotangents.get(i)
            total = cotangent if earlier is None else earlier[0] + cotangent
            self._cotangents[i] = (total, total._version)

    def forget(self) -> None:
        """Drop what backwards have brought; the forward stays."""
        self._cotangents = {}

    def take(self) -> tuple[ForwardPass, dict[int, Tensor]]:
        """The pass and its outputs' gradients, to be used once. Nothing of them stays here."""
        assert self._forward is not None
        if any(cotangent._version != version for cotangent, version in self._cotangents.values()):
            raise StepError(
                "A gradient that backward() was given was written to in place before optimizer.step(). Hand over a "
                "copy: output.backward(gradient.clone())."
            )
        forward, cotangents = self._forward, {i: cotangent for i, (cotangent, _) in self._cotangents.items()}
        self._forward, self._cotangents = None, {}
        self._on_used()
        return forward, cotangents


OnBackward = Callable[[Passage], None]


def visit_gradients(
    passages: Sequence[Passage], visit: Callable[[PerSampleGradients], None], *, loss_scale: float = 1.0
) -> None:
    """Show the gradients of each example's own loss, summed over passages, part by part.

    In full precision, whatever autocast is around, and without building a graph.

    Args:
        passages: all over the same batch, from one engine; they are used up.
        visit: is shown each part.
        loss_scale: what every loss was multiplied by before its backward, which is taken out again.

    The way back is gone with gradients as they came, not multiplied by N for a mean first: in half precision that
    would overflow where plain training does not.
    """
    if not passages or passages[0].size == 0:
        return
    divisor, engine = passages[0].divisor, passages[0].engine
    assert all(passage.engine is engine and passage.size == passages[0].size for passage in passages)
    passes = [passage.take() for passage in passages]
    devices = {cotangent.device.type for _, cotangents in passes for cotangent in cotangents.values()}
    with torch.no_grad(), ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        for part in engine.gradients(passes):
            visit(_Rescaled(part=part, factor=divisor / loss_scale))


@dataclass(frozen=True, kw_only=True)
class _Rescaled:
    """Gradients times a number."""

    part: PerSampleGradients
    factor: float

    def norms(self) -> Tensor:
        return self.part.norms() * self.factor

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        return self.part.weighted_sum(weights * self.factor)

    def materialize(self) -> dict[str, Tensor]:
        return {name: gradient * self.factor for name, gradient in self.part.materialize().items()}


def forward_with_boundary(
    engine: Engine,
    batch: ExampleBatch,
    trainable: Mapping[str, Tensor],
    *,
    loss_reduction: LossReduction,
    on_backward: OnBackward,
    on_used: Callable[[], None],
) -> tuple[Any, OutputLayout]:
    """Run the model and return its output; each backward through that output calls `on_backward`.

    Args:
        engine: who computes.
        batch: N examples; N may be 0.
        trainable: parameters by name.
        loss_reduction: how the loss that will be built on the output combines examples.
        on_backward: told of the passage at each backward, before that adds to it; may refuse by raising.
        on_used: called when the gradients are about to be computed.

    Returns:
        The model's output, as the model returns it for the whole batch. A scalar that the model computes
        (a loss inside the model) is combined over examples by `loss_reduction`. And its layout.
    """
    forward = engine.forward(batch, trainable) if batch.size else _empty_forward(engine, batch, trainable)
    passage = Passage(
        engine,
        forward,
        trainable=frozenset(trainable),
        size=batch.size,
        divisor=batch.size if loss_reduction == "mean" else 1,
        on_used=on_used,
    )
    differentiable = [i for i, leaf in enumerate(forward.outputs) if is_differentiable(leaf)]
    layout, outputs = forward.layout, list(forward.outputs)
    del forward
    anchor = torch.zeros((), requires_grad=True)  # makes autograd call us; nothing flows into it
    with torch.enable_grad():
        attached = _Boundary.apply(anchor, [outputs[i] for i in differentiable], passage, on_backward)
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
        ctx: Any, anchor: Tensor, outputs: list[Tensor], passage: Passage, on_backward: OnBackward
    ) -> tuple[Tensor, ...]:
        ctx.passage = passage
        ctx.on_backward = on_backward
        ctx.save_for_backward(anchor)  # so that a second backward has to be announced by retain_graph, as ever
        # A view that leaves a custom function could not be written to in place by the loss.
        return tuple(output.clone() if output._is_view() else output for output in outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, None, None, None]:
        if torch.is_grad_enabled():  # in a backward only under create_graph
            raise StepError(
                "backward(create_graph=True) reached the private model. A graph of the gradients would lead to "
                "gradients of gradients, which mix examples and are not computed one example at a time. Call "
                "backward() without create_graph; gradients of a loss with respect to the model's outputs may be "
                "taken with torch.autograd.grad(..., create_graph=True)."
            )
        assert len(ctx.saved_tensors) == 1  # reading them raises if an earlier backward has freed them
        ctx.on_backward(ctx.passage)
        ctx.passage.add(cotangents)
        return None, None, None, None


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
