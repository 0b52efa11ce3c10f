"""Runs a model for per-sample gradients: chooses the engine, checks the first batch, follows the loss."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dpdl.errors import ModelError, PrivacyWarning
from dpdl.execution import Execution
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.boundary import OnBackward, forward_with_boundary
from dpdl.per_sample.compiled import refuse_compiled
from dpdl.per_sample.engine import Engine, form_of, is_differentiable
from dpdl.per_sample.fallback import FallingBack
from dpdl.per_sample.isolation import EXAMPLES, find_batch_norms, find_mixing, find_mixing_in_a_crowd, refuse_mixing
from dpdl.per_sample.layout import OutputLayout
from dpdl.per_sample.loop import LoopEngine
from dpdl.per_sample.loss_trace import LossChecks, LossTrace, untraced
from dpdl.per_sample.randomness import isolated_randomness
from dpdl.per_sample.select import select_engine, why_not
from dpdl.per_sample.self_check import first_finite
from dpdl.per_sample.tape.refusal import TapeRefusal

__all__ = ["PerSampleRunner", "plain_arguments"]

# The loss is checked on the first batches, until it was confirmed for two sizes (a constant that happens to
# be the first batch's size would pass for a mean once) or this often; after that on batch 8, 16, 32, ...
LOSS_CHECKS = 4


# From this batch on, at each power of two, whole batches are looked at for examples that reach each other.
CROWD_CHECKS = 8


class PerSampleRunner:
    """The forward of a model whose backwards lead to per-sample gradients.

    Args:
        module: the model, as the user built it.
        execution: engine, dtypes, chunks, checks, and the loss's reduction.

    Raises:
        ModelError: the module is compiled.
    """

    def __init__(self, module: nn.Module, execution: Execution) -> None:
        refuse_compiled(module)
        self.module = module
        self.execution = execution
        self._engine: Engine | None = None
        self._engine_note = ""
        self._refused: dict[str, str] = {}  # engines that "auto" has given up, and why
        self._falling_back = FallingBack(
            module, accumulate_dtype=execution.accumulate_dtype, successor=self._successor_of
        )
        self._known_forms: set[Hashable] = set()  # of calls that the engine was tried and checked on
        self._saw_a_crowd = False
        self._trace: LossTrace | None = None
        self._batches = 0
        self._loss_checks = LossChecks(execution.loss_reduction, on_untold=self._warn_of_trust)
        self._trusts = False  # a loss that could not be run again
        self._reduced_by_us = False

    @property
    def engine_name(self) -> str | None:
        """The engine in use; None before the first batch."""
        return None if self._engine is None else self._engine.name

    @property
    def notes(self) -> list[str]:
        """What a report should say of how gradients were computed."""
        notes = [self._engine_note] if self._engine_note else []
        if self._engine is not None and not self.execution.self_check:
            notes.append("that the model keeps examples apart was not checked (self_check=False)")
        if self._engine is not None and not self._loss_checks.confirmed_sizes and not self._reduced_by_us:
            why = "could not be checked" if self.execution.self_check else "was not checked (self_check=False)"
            notes.append(f"that the loss is a {self.execution.loss_reduction} over examples was declared and {why}")
        return notes

    def begin_batch(self, batch: Any, size: int) -> Any:
        """What the loss will be computed from besides the outputs: the batch, followed if it is time to.

        Args:
            batch: any tree of tensors with the examples on their first axis.
            size: N.
        """
        self._batches += 1
        self._end_trace()
        if size < 2 or not self._loss_check_is_due():
            return batch
        self._trace = LossTrace(batch_size=size, turn=self._batches, checks=self._loss_checks)
        return self._trace.follow_batch(batch)

    def _loss_check_is_due(self) -> bool:
        if not self.execution.self_check or self._reduced_by_us:
            return False
        first_ones = self._batches <= LOSS_CHECKS and len(self._loss_checks.confirmed_sizes) < 2
        return first_ones or (self._batches > LOSS_CHECKS and self._batches.bit_count() == 1)

    def _crowd_check_is_due(self) -> bool:
        """On the first batch that is a crowd, and on the 8th, 16th, 32nd, ...: what mixes may depend on the data."""
        return not self._saw_a_crowd or (self._batches >= CROWD_CHECKS and self._batches.bit_count() == 1)

    def forward(self, batch: ExampleBatch, trainable: Mapping[str, Tensor], on_backward: OnBackward) -> Any:
        """The model's output for `batch`; each backward through it calls `on_backward`.

        It may be called several times for a batch, whose examples each pass has to be of.

        Raises:
            ModelError: the model mixes examples, keeps state, has complex parameters, or no engine can run it.
        """
        _refuse_complex(trainable)
        refuse_mixing(find_batch_norms(self.module))
        engine = self._engine_for(batch, trainable)
        if self.execution.self_check and not engine.keeps_examples_apart and self._crowd_check_is_due():
            refuse_mixing(find_mixing_in_a_crowd(self.module, batch))
            self._saw_a_crowd |= batch.size > EXAMPLES
        try:
            output, layout = self._run(engine, batch, trainable, on_backward)
        except TapeRefusal as refusal:
            if self.execution.engine != "auto":
                raise
            successor = self._successor_of(engine, str(refusal), batch, trainable)
            output, layout = self._run(successor, batch, trainable, on_backward)
        return output if self._trace is None else self._followed(output, layout, self._trace)

    def _run(
        self, engine: Engine, batch: ExampleBatch, trainable: Mapping[str, Tensor], on_backward: OnBackward
    ) -> tuple[Any, OutputLayout]:
        if self.execution.engine == "auto" and batch.size:
            self._falling_back.use(engine)
            engine = self._falling_back
        return forward_with_boundary(
            engine,
            batch,
            trainable,
            loss_reduction=self.execution.loss_reduction,
            on_backward=on_backward,
            on_used=self._end_trace,
        )

    def _successor_of(
        self, engine: Engine, reason: str, batch: ExampleBatch, trainable: Mapping[str, Tensor]
    ) -> Engine:
        """The engine to use after one has refused a batch, from now on."""
        self._refused[engine.name] = reason
        self._engine = None
        return self._engine_for(batch, trainable)

    def _engine_for(self, batch: ExampleBatch, trainable: Mapping[str, Tensor]) -> Engine:
        """The engine in use. A call of another form than those before is tried and checked first."""
        if not batch.size:
            return self._engine or LoopEngine(self.module)  # nothing to be learned from it
        form = (form_of(self.module, batch), *trainable)
        if self._engine is not None and form in self._known_forms:
            return self._engine
        checked = self.execution.self_check
        if checked:
            refuse_mixing(find_mixing(self.module, batch))
        if self._engine is None or why_not(self._engine, batch, trainable, checked=checked) is not None:
            with isolated_randomness(batch.device):  # whoever selected before draws the same dropout as who does now
                selection = select_engine(
                    self.execution.engine,
                    self.module,
                    batch,
                    trainable,
                    accumulate_dtype=self.execution.accumulate_dtype,
                    chunk_size=self.execution.chunk_size,
                    checked=checked,
                    refused=self._refused,
                )
            self._engine, self._engine_note = selection.engine, selection.note
            self._known_forms.clear()
        if not checked or len(first_finite(batch, 1)):
            self._known_forms.add(form)
        return self._engine

    def _followed(self, output: Any, layout: OutputLayout, trace: LossTrace) -> Any:
        leaves, spec = tree_flatten(output)
        differentiable = [i for i, leaf in enumerate(leaves) if is_differentiable(leaf)]
        if any(layout.axes[i] is None for i in differentiable):
            # The model computes a loss itself: it was computed for each example and reduced as declared.
            self._reduced_by_us = True
            return output
        trace.begin_pass()
        for i in differentiable:
            axis = layout.axes[i]
            assert axis is not None
            leaves[i] = trace.follow_output(leaves[i], axis=axis)
        return tree_unflatten(leaves, spec)

    def _end_trace(self) -> None:
        trace, self._trace = self._trace, None
        if trace is not None:
            trace.end()

    def _warn_of_trust(self) -> None:
        if not self._trusts:
            warnings.warn(
                "The loss could not be computed again from the operations that led to it (foreign code, or shapes that "
                f"depend on the data), so that it is a {self.execution.loss_reduction} over examples, and that each "
                "enters it alone, is taken on trust: the guarantee rests on it. Write it with torch operations on the "
                "model's outputs and on tensors with one row an example, and it is checked.",
                PrivacyWarning,
                stacklevel=2,
            )
        self._trusts = True


def _refuse_complex(trainable: Mapping[str, Tensor]) -> None:
    for name, parameter in trainable.items():
        if parameter.is_complex():
            raise ModelError(
                f"Parameter '{name}' of the model is complex; norms and sums are of real tensors. Train its real and "
                "imaginary parts as one real parameter (torch.view_as_real), and make it complex in forward "
                "(torch.view_as_complex); or freeze it."
            )


def plain_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments, with tensors of a followed batch as plain ones."""
    plain: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(untraced, (args, kwargs))
    return plain
