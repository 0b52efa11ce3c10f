"""Runs a model for per-sample gradients: chooses the engine, checks the first batch, follows the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dpdl.execution import Execution
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.boundary import OnBackward, forward_with_boundary
from dpdl.per_sample.engine import Engine, is_differentiable
from dpdl.per_sample.isolation import find_batch_norms, find_mixing, refuse_mixing
from dpdl.per_sample.layout import OutputLayout
from dpdl.per_sample.loss_trace import LossTrace
from dpdl.per_sample.select import select_engine
from dpdl.per_sample.self_check import refuse_mismatch

__all__ = ["PerSampleRunner"]

# Batches on which the loss is checked: until it was confirmed for two sizes (a constant that happens to be
# the first batch's size would pass for a mean once), or this often.
LOSS_CHECKS = 4


class PerSampleRunner:
    """The forward of a model whose backward delivers per-sample gradients.

    Args:
        module: the model, as the user built it.
        execution: engine, dtypes, chunks, checks, and the loss's reduction.
    """

    def __init__(self, module: nn.Module, execution: Execution) -> None:
        self.module = module
        self.execution = execution
        self._engine: Engine | None = None
        self._engine_note = ""
        self._model_unchecked = execution.self_check
        self._loss_checks_left = LOSS_CHECKS if execution.self_check else 0
        self._confirmed_sizes: set[int] = set()
        self._reduced_by_us = False

    @property
    def engine_name(self) -> str | None:
        """The engine in use; None before the first batch."""
        return None if self._engine is None else self._engine.name

    @property
    def notes(self) -> list[str]:
        """What a report should say of how gradients were computed."""
        notes = [self._engine_note] if self._engine_note else []
        if self._engine is not None and not self._confirmed_sizes and not self._reduced_by_us:
            why = "could not be checked" if self.execution.self_check else "was not checked (self_check=False)"
            notes.append(f"that the loss is a {self.execution.loss_reduction} over examples was declared and {why}")
        return notes

    def forward(self, batch: ExampleBatch, trainable: Mapping[str, Tensor], on_backward: OnBackward) -> Any:
        """The model's output for `batch`; its backward calls `on_backward`.

        Raises:
            ModelError: the model mixes examples, keeps state, or no engine can run it.
        """
        refuse_mixing(find_batch_norms(self.module))
        if self._model_unchecked and batch.size >= 2:
            refuse_mixing(find_mixing(self.module, batch))
        engine = self._engine_for(batch, trainable)
        if self._model_unchecked and batch.size >= 2:
            refuse_mismatch(engine, batch, trainable)
            self._model_unchecked = False
        output, layout = forward_with_boundary(
            engine,
            batch,
            trainable,
            loss_reduction=self.execution.loss_reduction,
            on_backward=on_backward,
        )
        if self._loss_checks_left and batch.size >= 2:
            output = self._followed(output, layout, batch.size)
        return output

    def _engine_for(self, batch: ExampleBatch, trainable: Mapping[str, Tensor]) -> Engine:
        if self._engine is None:
            selection = select_engine(
                self.execution.engine,
                self.module,
                batch,
                trainable,
                accumulate_dtype=self.execution.accumulate_dtype,
                chunk_size=self.execution.chunk_size,
            )
            self._engine, self._engine_note = selection.engine, selection.note
        return self._engine

    def _followed(self, output: Any, layout: OutputLayout, size: int) -> Any:
        leaves, spec = tree_flatten(output)
        positions = [
            i
            for i, (leaf, axis) in enumerate(zip(leaves, layout.axes, strict=True))
            if axis is not None and is_differentiable(leaf)
        ]
        if len(positions) < sum(is_differentiable(leaf) for leaf in leaves):
            # The model computes a loss itself: it was computed for each example and reduced as declared.
            self._loss_checks_left, self._reduced_by_us = 0, True
            return output
        trace = LossTrace(
            [leaves[i] for i in positions],
            batch_axes=[axis for i in positions if (axis := layout.axes[i]) is not None],
            batch_size=size,
            loss_reduction=self.execution.loss_reduction,
            on_checked=lambda confirmed: self._loss_was_checked(size, confirmed),
        )
        for i, followed in zip(positions, list(trace.outputs), strict=True):
            leaves[i] = followed
        return tree_unflatten(leaves, spec)

    def _loss_was_checked(self, size: int, confirmed: bool) -> None:
        if confirmed:
            self._confirmed_sizes.add(size)
        done = len(self._confirmed_sizes) > 1
        self._loss_checks_left = 0 if done else self._loss_checks_left - 1
