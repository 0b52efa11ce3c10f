"""The tape engine: one plain forward, operation by operation, and per-sample gradients from what it recorded.

The model runs as it is, for the whole batch at once. A function mode sees every torch operation; those that take a
parameter leave what is needed to answer for each example's gradient norm, and for a weighted sum of gradients, once
the gradients of their outputs are known. No weight gradient of the batch is ever computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.engine import Engine, ForwardPass, PerSampleGradients, form_of, is_differentiable, refuse_written
from dpdl.per_sample.layout import OutputLayout
from dpdl.per_sample.module_state import BorrowedState
from dpdl.per_sample.tape.attribution import Rehearsal
from dpdl.per_sample.tape.contribution import Contribution
from dpdl.per_sample.tape.gradients import TapeGradients
from dpdl.per_sample.tape.plan import Plan
from dpdl.per_sample.tape.recomputation import leaf_gradients
from dpdl.per_sample.tape.recorder import Recorder
from dpdl.per_sample.tape.refusal import PlanIsStale, TapeRefusal
from dpdl.per_sample.tape.source import Source
from dpdl.per_sample.tape.survey import survey

__all__ = ["TapeEngine"]

# Surveys of one form of call before giving up: each sees paths that chance (layer drop) has hidden from those before.
SURVEYS = 8
KNOWN_FORMS = 1024
CROWD = 3  # a way that so few examples have taken may still be another for more
REMEDY = "Nothing was spent. Use Execution(engine='vmap') or engine='loop', which compute each example on its own"
# From this pass on, at each power of two, what arrives is checked to be each example's own.
REHEARSALS = 8


class TapeEngine(Engine):
    """Per-sample gradients from a record of one plain forward pass.

    Args:
        module: the model. It runs on its own parameters, with copies of its buffers.
    """

    name: ClassVar[str] = "tape"
    keeps_examples_apart: ClassVar[bool] = False

    def __init__(self, module: nn.Module, *, accumulate_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(module, accumulate_dtype=accumulate_dtype)
        self._plans: dict[object, Plan] = {}
        self._state = BorrowedState(module)
        self._known_ways: set[Hashable] = set()
        self._passes = 0
        self._given_up = ""  # why, once a pass had to be refused when its forward was over

    def forward(self, batch: ExampleBatch, trainable: Mapping[str, Tensor]) -> ForwardPass:
        """Run the model on a batch of at least one example; see `Engine.forward`.

        Raises:
            TapeRefusal: a call cannot be recorded.
        """
        if self._given_up:
            raise TapeRefusal(self._given_up)
        layout = self.layout_of(trainable, batch)
        shapes = tuple(leaf.shape[1:] for leaf in batch.row_leaves)
        form = (form_of(self.module, batch), shapes, *trainable)
        if form not in self._plans:
            while len(self._plans) >= KNOWN_FORMS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[form] = survey(self.module, batch, trainable, Plan())
        recorder, leaves = self._recorded(batch, trainable, layout, form)
        way = (form, recorder.way)  # as it is now: parts that run again in the backward go on with it
        outputs = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        way_back = _TapePullBack(
            recorder=recorder,
            leaves=leaves,
            axes=layout.axes,
            parameters=dict(trainable),
            others=[p for p in self.module.parameters() if p.requires_grad],
            device=batch.device.type,
            rehearse=lambda: self._rehearsal(recorder, way),
            on_rehearsed=lambda: self._known_ways.add(way),
        )
        return ForwardPass(outputs=outputs, layout=layout, pull_back=way_back)

    def _rehearsal(self, recorder: Recorder, way: Hashable) -> Rehearsal | None:
        """Needed where the examples' order in the rows is not known for this way through the model, or may depend on
        the data; and now and then."""
        self._passes += 1
        due = self._passes >= REHEARSALS and self._passes.bit_count() == 1
        if recorder.examples < 2 or not (recorder.moves_rows or way not in self._known_ways or due):
            return None
        half = any(p.dtype == torch.float16 for p in self.module.parameters())
        return Rehearsal(recorder.examples, self._passes, half_precision=half)

    def gradients(self, passes: Sequence[tuple[ForwardPass, Mapping[int, Tensor]]]) -> Iterator[PerSampleGradients]:
        """All examples in one part; several passes are joined use by use, not materialised."""
        ways = [(_tape_of(forward), cotangents) for forward, cotangents in passes]
        try:
            for way, cotangents in ways:
                way.go_back(cotangents, alone=len(ways) == 1)
        except PlanIsStale as met:
            self._given_up = f"{met} takes another form when it runs again in the backward"
            raise TapeRefusal(f"{self._given_up}. {REMEDY}") from met
        except TapeRefusal as refusal:
            self._given_up = str(refusal)
            raise TapeRefusal(f"{self._given_up}. {REMEDY}") from refusal
        first = ways[0][0].recorder
        received: dict[Source, list[Contribution]] = {}
        sources: dict[str, Source] = {}  # a parameter is one source, whichever pass used it
        for way, _ in ways:
            for source, parts in way.recorder.received.items():
                one = sources.setdefault(source.parameters[0], source) if source.is_parameter else source
                received.setdefault(one, []).extend(parts)
        yield TapeGradients(
            received, ways[0][0].parameters, examples=first.examples, accumulate_dtype=self.accumulate_dtype
        )

    def _recorded(
        self, batch: ExampleBatch, trainable: Mapping[str, Tensor], layout: OutputLayout, form: object
    ) -> tuple[Recorder, list[Any]]:
        stale = ""
        for _ in range(SURVEYS):
            if self._plans[form].trouble:
                raise TapeRefusal(self._plans[form].trouble)
            recorder = Recorder(
                examples=batch.size,
                trainable=trainable,
                plan=self._plans[form],
                accumulate_dtype=self.accumulate_dtype,
            )
            try:
                return recorder, self._run(recorder, batch, trainable, layout)
            except PlanIsStale as met:
                stale = str(met)
                self._plans[form] = survey(self.module, batch, trainable, self._plans[form])
        raise TapeRefusal(f"{stale} takes another form each time that the model runs")

    def _run(
        self, recorder: Recorder, batch: ExampleBatch, trainable: Mapping[str, Tensor], layout: OutputLayout
    ) -> list[Any]:
        args, kwargs = batch.call_arguments()
        versions = [p._version for p in trainable.values()]
        with torch.enable_grad(), self._state, recorder:
            leaves = layout.leaves(self.module(*args, **kwargs))
        recorder.recording = False
        refuse_written(
            self._state.written
            + [n for (n, p), version in zip(trainable.items(), versions, strict=True) if p._version != version]
        )
        for leaf, axis in zip(leaves, layout.axes, strict=True):
            if axis is None and is_differentiable(leaf) and leaf.requires_grad:
                raise TapeRefusal(
                    "the model computes a scalar (its own loss) from the whole batch; compute the loss outside of the "
                    "model for the tape"
                )
        return leaves


@contextmanager
def _without_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, `.grad` is empty; afterwards it is what it was."""
    kept = [(p, p.grad) for p in parameters]
    for p, _ in kept:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in kept:
            p.grad = gradient


@dataclass(frozen=True, kw_only=True)
class _TapePullBack:
    recorder: Recorder
    leaves: list[Any]
    axes: tuple[int | None, ...]
    parameters: dict[str, Tensor]
    others: list[Tensor]
    device: str
    rehearse: Callable[[], Rehearsal | None]
    on_rehearsed: Callable[[], None]

    def __call__(self, cotangents: Mapping[int, Tensor]) -> Iterator[TapeGradients]:
        self.go_back(cotangents, alone=True)
        recorder = self.recorder
        yield TapeGradients(
            recorder.received,
            self.parameters,
            examples=recorder.examples,
            accumulate_dtype=recorder.accumulate_dtype,
        )

    def go_back(self, cotangents: Mapping[int, Tensor], *, alone: bool) -> None:
        """Go back through the graph, once; the recorder then holds what each source has received.

        Args:
            alone: whether this pass's gradients are all; if so norms of single uses are taken on the way.
        """
        recorder = self.recorder
        recorder.norms_on_the_way = alone
        used = [i for i in cotangents if self.leaves[i].requires_grad]
        outputs = [self.leaves[i] for i in used]
        self.leaves.clear()
        if not used:
            return
        recorder.rehearsal = self.rehearse()
        recorder.going_back = True
        try:
            self._go_back(outputs, [cotangents[i] for i in used], [self.axes[i] for i in used])
        finally:
            recorder.going_back = False
        if recorder.rehearsal is not None and recorder.examples > CROWD:
            self.on_rehearsed()

    def _go_back(self, outputs: list[Tensor], cotangents: list[Tensor], axes: list[int | None]) -> None:
        recorder = self.recorder
        # Parameters are asked for too: one that receives something is used by a way that the recorder does not see. And
        # no `.grad` of theirs may be left behind, also by checkpoints that run a backward of their own.
        with _without_gradients([*self.parameters.values(), *self.others]):
            with torch.autocast(self.device, enabled=False), recorder.again():
                if recorder.rehearsal is not None:
                    scaled = [recorder.rehearsal.scaled(c, axis) for c, axis in zip(cotangents, axes, strict=True)]
                    self._go(outputs, scaled, keep=True)
                    recorder.rehearsal.end()
                self._go(outputs, cotangents, keep=False)
                if recorder.rehearsal is not None:
                    recorder.rehearsal.refuse_missing()
            unseen = [name for name, p in self.parameters.items() if p.grad is not None]
        if unseen:
            raise TapeRefusal(f"parameters {unseen} are used in a way that torch's function modes do not see")

    def _go(self, outputs: list[Tensor], cotangents: list[Tensor], *, keep: bool) -> None:
        recorder = self.recorder
        leaves = [copies.leaf for copies in recorder.copies]
        parameters = [p for p in self.parameters.values() if p.requires_grad]  # some may be frozen by now
        found = leaf_gradients(
            outputs, cotangents, [recorder.anchor, *leaves, *parameters], reentrant=recorder.plan.hidden, keep=keep
        )[1 : 1 + len(leaves)]
        found += [copies.leaf.grad for copies in recorder.copies[len(found) :]]
        for copies, gradient in zip(recorder.copies, found, strict=True):
            copies.leaf.grad = None
            if gradient is not None:
                with torch.no_grad():
                    recorder.receive(copies.source, copies.to_contribution(recorder.at_least(gradient)))


def _tape_of(forward: ForwardPass) -> _TapePullBack:
    assert isinstance(forward.pull_back, _TapePullBack)  # the passes are this engine's
    return forward.pull_back
