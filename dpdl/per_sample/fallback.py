"""Engine "auto" once a batch is on its way: what the tape refuses on the way back goes through another engine.

The tape may find out only in `optimizer.step()` that it cannot tell whose rows are whose. The loss has been computed by
then, from outputs that were handed out; what can be done again is the model's part. Another engine runs the same batch
forward once more and takes the same gradients of the outputs. That is right where its outputs are those that were
handed out, for each example: it computes each alone, so the loss was then computed from outputs that depend on no other
example. Where the model has drawn random numbers its outputs cannot come again, as each engine draws them in its own
order; the batch is then refused, and stays to be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dpdl.errors import ModelError
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.engine import Engine, ForwardPass, FrozenCall, PerSampleGradients, detached, is_differentiable
from dpdl.per_sample.layout import OutputLayout
from dpdl.per_sample.randomness import RandomState, isolated_randomness
from dpdl.per_sample.self_check import tolerance_of
from dpdl.per_sample.tape.refusal import TapeRefusal

__all__ = ["FallingBack", "Successor"]

# Numbers of an output that are kept, to be compared with those of a second run.
KEPT_NUMBERS = 2**16
# Half precision rounds so coarsely that examples which reach each other could hide in it.
LARGEST_TOLERANCE = 1e-2

Successor = Callable[[Engine, str, ExampleBatch, Mapping[str, Tensor]], Engine]


class FallingBack(Engine):
    """Runs batches by an engine that may be exchanged, also between a forward pass and its way back.

    Args:
        module: the model.
        successor: given the engine that refused, why, and the batch: the engine to use from then on.
    """

    name: ClassVar[str] = "auto"
    keeps_examples_apart: ClassVar[bool] = False

    def __init__(self, module: nn.Module, *, accumulate_dtype: torch.dtype, successor: Successor) -> None:
        super().__init__(module, accumulate_dtype=accumulate_dtype)
        self._successor = successor
        self._engine: Engine | None = None

    def use(self, engine: Engine) -> None:
        """Run what comes by this engine."""
        self._engine = engine

    def forward(self, batch: ExampleBatch, trainable: Mapping[str, Tensor]) -> ForwardPass:
        """Run the model by the engine in use; see `Engine.forward`."""
        assert self._engine is not None
        before = RandomState(batch.device)
        settings = _Settings(self.module, batch.device)
        forward = self._engine.forward(batch, trainable)
        way_back = _Pass(
            engine=self._engine,
            forward=replace(forward, outputs=[]),
            batch=batch,
            trainable=trainable,
            settings=settings,
            drew_random_numbers=before.has_moved(),
            kept=_some_numbers(forward.outputs, forward.layout),
        )
        return ForwardPass(outputs=forward.outputs, layout=forward.layout, pull_back=way_back)

    def gradients(self, passes: Sequence[tuple[ForwardPass, Mapping[int, Tensor]]]) -> Iterator[PerSampleGradients]:
        """By the engine that ran the passes; if it refuses, or there were several, by one that runs them all again."""
        gone = [(_pass_of(forward), cotangents) for forward, cotangents in passes]
        last = gone[-1][0]
        reason = "passes over this batch were run by different engines"
        if all(one.engine is last.engine for one, _ in gone):
            try:  # the tape refuses before it yields anything
                yield from last.engine.gradients([(one.forward, cotangents) for one, cotangents in gone])
                return
            except TapeRefusal as refusal:
                reason = str(refusal).split(". ")[0]
            with last.settings.restored(), isolated_randomness(last.batch.device):
                engine = self._successor(last.engine, reason, last.batch, last.trainable)
        else:
            engine = last.engine
        again = [(one.run_again(self.module, engine, reason), cotangents) for one, cotangents in gone]
        yield from engine.gradients(again)


class _Settings:
    """Autocast, and the modes of a module's parts, at one moment."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._modes = [(child, child.training) for child in module.modules()]
        kind = device.type
        self._autocast = partial(
            torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, they are what they were, and graphs may be built."""
        now = [(child, child.training) for child, _ in self._modes]
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._autocast())
            stack.callback(_set_modes, now)
            _set_modes(self._modes)
            yield


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for child, training in modes:
        child.training = training


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """A forward pass, its way back, and what is needed to run it again.

    Attributes:
        engine: who ran it.
        forward: without its outputs.
        kept: some numbers of each output, as it was handed out.
    """

    engine: Engine
    forward: ForwardPass
    batch: ExampleBatch
    trainable: Mapping[str, Tensor]
    settings: _Settings
    drew_random_numbers: bool
    kept: list[Tensor | None]

    def __call__(self, cotangents: Mapping[int, Tensor]) -> Iterator[PerSampleGradients]:
        return self.forward.pull_back(cotangents)

    def run_again(self, module: nn.Module, engine: Engine, reason: str) -> ForwardPass:
        """The same pass by another engine.

        Raises:
            ModelError: its outputs would not be those that were handed out.
        """
        if self.drew_random_numbers:
            raise self._refusal(engine, reason, "it drew random numbers, which cannot be drawn again in the same way")
        with self.settings.restored(), isolated_randomness(self.batch.device):
            forward = engine.forward(self.batch, self.trainable)
            together = FrozenCall(module, self.trainable)(detached(self.trainable), self.batch.copy())
        layout = self.forward.layout
        expected = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in layout.leaves(together)]
        kept_again = _some_numbers(forward.outputs, layout)
        for i, axis in enumerate(layout.axes):
            # What was handed out is only sampled, for its size. The whole of it is compared as the model gives it now.
            if not _same(self.kept[i], kept_again[i], axis) or (
                axis is not None and not _same(expected[i], forward.outputs[i], axis)
            ):
                why = f"the model's output {i}, computed again for each example alone, is not what was handed out"
                raise self._refusal(engine, reason, why)
        return replace(forward, outputs=[])

    def _refusal(self, engine: Engine, reason: str, why: str) -> ModelError:
        return ModelError(
            f"Engine '{self.engine.name}' cannot compute this batch's gradients: {reason}. From now on engine "
            f"'{engine.name}' is used, but this batch's forward cannot be taken over by it: {why}. Nothing was spent. "
            "Call the private model on the batch again, then backward() and step(); or choose "
            f"Execution(engine='{engine.name}') from the beginning."
        )


def _pass_of(forward: ForwardPass) -> _Pass:
    assert isinstance(forward.pull_back, _Pass)  # the passes are this engine's
    return forward.pull_back


def _some_numbers(outputs: Sequence[Any], layout: OutputLayout) -> list[Tensor | None]:
    """Of each differentiable output a grid over all examples; all of it if it is small."""
    kept: list[Tensor | None] = []
    for leaf, axis in zip(outputs, layout.axes, strict=True):
        if not is_differentiable(leaf):
            kept.append(None)
            continue
        batch_axis, others = axis or 0, max(1, leaf.ndim - 1)
        along_each = max(1, int((KEPT_NUMBERS / max(1, leaf.shape[batch_axis])) ** (1 / others)))
        steps = [1 if i == batch_axis else -(-size // along_each) or 1 for i, size in enumerate(leaf.shape)]
        kept.append(leaf.detach()[tuple(slice(None, None, step) for step in steps)].clone())
    return kept


def _same(first: Any, second: Any, axis: int | None) -> bool:
    """Whether two outputs agree for each example, but for rounding."""
    if not is_differentiable(first):
        return True
    if first.shape != second.shape:
        return False
    a, b = (tensor.movedim(axis or 0, 0).reshape(tensor.shape[axis or 0], -1) for tensor in (first, second))
    finite = torch.isfinite(a).all(1)
    if not torch.equal(finite, torch.isfinite(b).all(1)):
        return False
    a, b = a[finite], b[finite]
    lengths = torch.linalg.vector_norm(a, dim=1, dtype=_wide(a))
    distances = torch.linalg.vector_norm(a - b, dim=1, dtype=_wide(a))
    scale = torch.maximum(lengths, lengths.mean()) if len(lengths) else lengths
    return bool((distances <= min(tolerance_of(a.dtype), LARGEST_TOLERANCE) * scale).all())


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64
