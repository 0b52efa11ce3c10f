"""The loop engine: one example at a time, plain autograd. The oracle, and the last resort."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.engine import Engine, ForwardPass, FrozenCall
from dpdl.per_sample.layout import OutputLayout
from dpdl.per_sample.materialized import MaterializedGradients

__all__ = ["LoopEngine"]


class LoopEngine(Engine):
    """Runs the model on batches of one, and keeps each example's graph until its gradient is asked for.

    Cost: N forwards and N backwards. Memory: the activations of all N examples, and the gradient of one.
    """

    name: ClassVar[str] = "loop"
    keeps_examples_apart: ClassVar[bool] = True

    def forward(self, batch: ExampleBatch, trainable: Mapping[str, Tensor]) -> ForwardPass:
        """Run the model on a batch of at least one example; see `Engine.forward`."""
        call = FrozenCall(self.module, trainable)
        layout = self.layout_of(trainable, batch)
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in trainable.items()}
        with torch.enable_grad():
            examples = [layout.leaves(call(leaves, batch.rows(slice(n, n + 1)).copy())) for n in range(batch.size)]
        call.refuse_written_state()
        outputs = [
            _joined(list(rows), axis) for rows, axis in zip(zip(*examples, strict=True), layout.axes, strict=True)
        ]
        way_back = _LoopPullBack(
            call=call, examples=examples, layout=layout, leaves=leaves, accumulate_dtype=self.accumulate_dtype
        )
        return ForwardPass(outputs=outputs, layout=layout, pull_back=way_back)


@dataclass(frozen=True, kw_only=True)
class _LoopPullBack:
    call: FrozenCall
    examples: list[list[Any]]
    layout: OutputLayout
    leaves: dict[str, Tensor]
    accumulate_dtype: torch.dtype

    def __call__(self, cotangents: Mapping[int, Tensor]) -> Iterator[MaterializedGradients]:
        for n, outputs in enumerate(self.examples):
            pairs = [
                (outputs[i], _example_of(cotangent, n, self.layout.axes[i], outputs[i]))
                for i, cotangent in cotangents.items()
                if outputs[i].requires_grad
            ]
            yield MaterializedGradients(tensors=self._gradients_of(pairs), accumulate_dtype=self.accumulate_dtype)

    def _gradients_of(self, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        if pairs:
            # Parts of the forward may run again (activation checkpointing): on the same leaves. backward() rather than
            # grad(), which one kind of checkpointing refuses.
            with self.call.holding(self.leaves):
                torch.autograd.backward([output for output, _ in pairs], [cotangent for _, cotangent in pairs])
        found = {}
        for name, leaf in self.leaves.items():
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach()
            # Lookups may give the rows that they have used; norms are of all rows.
            found[name] = (gradient.to_dense() if gradient.is_sparse else gradient).unsqueeze(0)
            leaf.grad = None
        return found


def _joined(rows: list[Any], axis: int | None) -> Any:
    """One example's output after another, along the batch axis."""
    if not isinstance(rows[0], Tensor):
        return rows[0]
    if axis is None:
        return torch.stack([row.detach() for row in rows])
    return torch.cat([row.detach() for row in rows], dim=axis)


def _example_of(cotangent: Tensor, n: int, axis: int | None, output: Tensor) -> Tensor:
    """What the batch's cotangent says of example n, shaped as that example's output."""
    return cotangent[n] if axis is None else cotangent.narrow(axis, n, 1).reshape(output.shape)
