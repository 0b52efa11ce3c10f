"""The outlet of a party that protects what leaves: each kind of content through its mechanism, all of it in the ledger.

    door = ReleaseDoor(
        activations=CutRelease(max_norm=1.0, noise_multiplier=4.0),
        labels=MemoizedRandomizedResponse(epsilon=2.0, classes=10, path="labels.store"),
        training=PartTraining.frozen(),
        ledger=ledger,
        stream=stream,
    )

With mode "release_once", rows that are not of the data (inference on new ones, without numbers) are noised anew each
time, and counted as if each were any row.

A party binds its door to each run (`bind`): a door that was told better than the run does is refused. What was released
is remembered over restarts by a `LedgerFile`, or by the party's state (`state_dict`); without a file the state is the
only record, and a process that ends without saving one has forgotten what it released.

What has no mechanism leaves as it is, and the door remembers that it did (`unprotected`): a report cannot miss it.
Receivers that get the same rows share one account, since they may talk.

Private: what is given to it. Public: what it gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from accountants import Composed, Event
from dpdl.errors import CheckpointError, ParameterError
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.process_lock import ProcessLock
from dpdl.secure_random import RandomStream
from dpdl.split.clip import Clip
from dpdl.split.cut_release import CutRelease
from dpdl.split.gradient_release import GradientRelease
from dpdl.split.graph import SplitGraph
from dpdl.split.kept_parts import FrozenPart, parts_before
from dpdl.split.labels import AnsweredLabels, LabelStore, MemoizedRandomizedResponse
from dpdl.split.outlet import Departed, Leaving
from dpdl.split.part_training import PartTraining
from dpdl.split.releaser import CachedRelease, RowReleaser
from dpdl.split.row_account import RowAccount
from dpdl.split.row_cache import RowCache
from dpdl.split.row_noise import clip_rows

__all__ = ["Once", "ReleaseDoor"]

_ONCE = "rows released once"
_SEEN = "rows seen by "  # and the receivers, as JSON: names may hold commas
_ANSWERED = "labels seen by "
_SCHEMA = "dpdl.split.door/1"


class Once:
    """What release_once needs beside the mechanism.

    Args:
        encoder: the frozen part whose output crosses; what leaves is computed by it, one example at a time. It must
            not have been trained on the private rows; that it stays as it is will be checked. Other parts of the party
            may train.
        inputs: row numbers [n] to the examples [n, ...] that they stand for.
        cache: where released rows are kept.
    """

    def __init__(self, *, encoder: nn.Module, inputs: Callable[[Tensor], Tensor], cache: RowCache) -> None:
        self.encoder = encoder
        self.inputs = inputs
        self.cache = cache


class ReleaseDoor:
    """An `Outlet` that releases through mechanisms.

    Args:
        activations: of what the party sends forward; None to send them as they are.
        gradients: of what it sends back; None likewise.
        labels: None likewise.
        training: how the parts change that what leaves goes through: the party's own, and earlier ones of other
            parties (`PartTraining.of`). A run that does worse is refused when it binds the door.
        ledger: of the party's data, under REPLACE_ONE.
        stream: of this door alone; each kind of content gets a child.
        once: with activations of mode "release_once".

    Guarantee:
        What has a mechanism leaves only through it, and is in the ledger before. What has none leaves as it is, and is
        named in reports.

    Raises:
        ParameterError: `once` is missing or left over, the ledger is of another relation, or an argument is of another
            kind.
    """

    def __init__(
        self,
        *,
        activations: CutRelease | None = None,
        gradients: GradientRelease | None = None,
        labels: MemoizedRandomizedResponse | None = None,
        training: PartTraining,
        ledger: Ledger | LedgerFile,
        stream: RandomStream,
        once: Once | None = None,
    ) -> None:
        for name, value, kind in (
            ("activations", activations, CutRelease | None),
            ("gradients", gradients, GradientRelease | None),
            ("labels", labels, MemoizedRandomizedResponse | None),
            ("training", training, PartTraining),
            ("stream", stream, RandomStream),
            ("once", once, Once | None),
        ):
            if not isinstance(value, kind):
                raise ParameterError(f"{name} of the door must be {kind}, got {value!r} ({type(value).__name__}).")
        keeps = activations is not None and activations.mode == "release_once"
        if keeps != (once is not None):
            raise ParameterError(
                "mode 'release_once' and `once` (encoder, inputs, cache) go together; got "
                f"{'none' if activations is None else activations.mode!r} and "
                f"{'no `once`' if once is None else '`once`'}."
            )
        RowAccount(ledger=ledger, run="activations", training=training)  # refuses the ledger now
        self.activations = activations
        self.gradients = gradients
        self._labels = labels
        self.training = training
        self.ledger = ledger
        self.unprotected: dict[tuple[str, ...], set[str]] = {}
        self._stream = stream
        self._once = once
        self._lock = ProcessLock()
        self._accounts: dict[tuple[str, ...], RowAccount] = {}
        self._releasers: dict[tuple[str, ...], RowReleaser] = {}
        self._cached: tuple[str, CachedRelease] | None = None  # of which part
        self._stores: dict[str, LabelStore] = {}
        self._frozen: dict[int, FrozenPart] = {}

    def bind(self, graph: SplitGraph, party: str, *, clip: Clip, noise_multiplier: float) -> None:
        """Compare what this door was told with a run that it is about to serve, and watch the parts that are frozen.

        Args:
            graph: the run's, with the party's own modules.
            party: whose rows leave here.
            clip: of the run.
            noise_multiplier: of the run's plan.

        Raises:
            ParameterError: parts train that were called frozen, or with less noise; or `once` has another encoder than
                the part whose rows leave. The door stays as it was.
        """
        before = set(parts_before(graph, party)) if self.activations is not None else set()
        own = {part.name for part in graph.parts if part.party == party} if self.gradients is not None else set()
        watched = [part for part in graph.parts if part.name in before | own and not part.trains and part.module]
        if self._once is not None:
            self._refuse_another_encoder(graph, party, before)
            before = set()
        real = PartTraining.of_parts(graph, before | own, clip=clip, noise_multiplier=noise_multiplier)
        if not self.training.covers(real):
            raise ParameterError(
                f"The door of '{party}' was told that the parts which its rows go through are {self.training}; in this "
                f"run they are {real}. Give it training=PartTraining.of(graph, '{party}', clip=clip, "
                "noise_multiplier=plan.noise_multiplier), with earlier parties if there are any."
            )
        with self._lock:
            self.training = replace(self.training, checked=True)
            for part in watched:
                assert part.module is not None
                self._frozen.setdefault(id(part.module), FrozenPart(part.name, part.module))

    def _refuse_another_encoder(self, graph: SplitGraph, party: str, before: set[str]) -> None:
        assert self._once is not None
        if trained := sorted(part.name for part in graph.trained if part.name in before):
            raise ParameterError(
                f"Rows are released once from a frozen part, and {trained} train in this run. Make the graph with "
                "trains=False and frozen weights, or release at each step."
            )
        sent = {cut.name for cut in graph.cuts if cut.sender == party and cut.kind == "activations"}
        if not any(graph.part(name).module is self._once.encoder for name in sent):
            raise ParameterError(
                f"The encoder of `once` is none of the parts {sorted(sent)} whose rows leave '{party}'. Give the "
                "part's own module, not a copy: what leaves must be what the network computes."
            )

    def __call__(self, leaving: Leaving) -> Departed:
        """What leaves instead of `leaving`; recorded in the ledger before it is made.

        Raises:
            BudgetExceededError: it would overspend.
            ParameterError: rows without numbers, where a mechanism must know which they are.
            CheckpointError, StepError, DataError: as the mechanisms.
        """
        with self._lock:  # two threads that each made the first releaser of a kind would draw the same noise
            return self._departed(leaving)

    def _departed(self, leaving: Leaving) -> Departed:
        mechanism = {"activations": self.activations, "gradients": self.gradients}.get(leaving.content)
        if leaving.content == "labels" and self._labels is not None:
            return Departed(rows=self._store_of(leaving).release(self._numbers(leaving), leaving.rows))
        if mechanism is None:
            self.unprotected.setdefault(leaving.receivers, set()).add(leaving.content)
            return Departed(rows=leaving.rows)
        for part in self._frozen.values():
            part.refuse_change()
        unknown = leaving.purpose == "infer" and leaving.row_numbers is None
        if self._once is not None and leaving.content == "activations" and not unknown:
            rows = self._released_once(leaving, self._once)
        else:
            step = (leaving.session, leaving.step) if leaving.purpose == "train" else None
            rows = self._releaser_of(leaving, mechanism).release(
                leaving.rows, leaving.row_numbers, number=leaving.step, step=step
            )
        if leaving.content == "gradients":
            return Departed(rows=rows)
        return Departed(rows=rows, pull_back=_through_the_clip(leaving.rows, mechanism.max_norm))

    @property
    def secure(self) -> bool:
        """Whether nobody knows the key that noise and answers are drawn with."""
        return self._stream.secure

    def account(self, *receivers: str) -> RowAccount:
        """What these receivers together have been given of each row."""
        if receivers not in self._accounts:
            run = f"{_SEEN}{json.dumps(receivers)}"
            self._accounts[receivers] = RowAccount(ledger=self.ledger, run=run, training=self.training)
        return self._accounts[receivers]

    @property
    def labels(self) -> MemoizedRandomizedResponse | None:
        """The labels' mechanism; with all answers that the ledger has, where one record's labels were answered twice.

        Whoever got them: a record's columns add up, and so does a store that was lost and drawn again.
        """
        runs = [run for run in self.ledger.runs if run.startswith(_ANSWERED)]
        segments = [segment for run in runs for segment in self.ledger.of_run(run)]
        spent = [segment.event for segment in segments for _ in range(segment.count)]
        if self._labels is None or not spent or spent == [self._labels.event]:
            return self._labels
        plan = self._labels
        return AnsweredLabels(epsilon=plan.epsilon, classes=plan.classes, path=plan.path, spent=Composed(tuple(spent)))

    def event(self, receiver: str | None = None) -> Event:
        """All that one receiver, or all of them together, have been given of the worst row.

        Activations, gradients, and the steps of the parts that they went through; labels are apart (`labels.event`).

        Raises:
            ModelError: a part that is called frozen is not what it was when rows left.
        """
        for part in self._frozen.values():
            part.refuse_claim()
        found = []
        for run in self.ledger.runs:  # the ledger knows what earlier processes released
            seen = json.loads(run.removeprefix(_SEEN)) if run.startswith(_SEEN) else []
            if run == _ONCE or (seen and receiver is None) or receiver in seen:
                found.append(RowAccount(ledger=self.ledger, run=run, training=self.training).event)
        return Composed(tuple(found))

    def state_dict(self) -> dict[str, Any]:
        """What was released, and what left as it was: plain values, no names of rows.

        Rows' own counts stay here: after a restart they begin at zero, while the ledger goes on, which is not less than
        the worst row's sum.
        """
        record = Ledger(relation=self.ledger.relation)
        for run in filter(_is_the_doors, self.ledger.runs):
            record.adopt(self.ledger.of_run(run))
        unprotected = [[list(to), sorted(kinds)] for to, kinds in sorted(self.unprotected.items())]
        return {"schema": _SCHEMA, "ledger": record.to_json(), "unprotected": unprotected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what `state_dict` returned, beside what is known here. No claim is ever lowered by it.

        Each release is counted once, whether the ledger has it already or not: an older state adds nothing, another
        door's adds all it has.

        Raises:
            CheckpointError: it is damaged, or not a door's; nothing was changed.
        """
        if not isinstance(state, Mapping) or state.get("schema") != _SCHEMA or not isinstance(state.get("ledger"), str):
            raise CheckpointError(f"Not the state of a door of {_SCHEMA}: what was released would be forgotten.")
        record = Ledger.from_json(state["ledger"])
        if record.relation is not self.ledger.relation:
            raise CheckpointError(f"The door's state is accounted for {record.relation.phrase}; it is damaged.")
        try:
            unprotected = {tuple(map(str, to)): set(map(str, kinds)) for to, kinds in state["unprotected"]}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"The door's state does not say what left as it was ({error!r}).") from error
        with self._lock:
            self.ledger.adopt(record.segments)
            for to, kinds in unprotected.items():
                self.unprotected.setdefault(to, set()).update(kinds)

    def _released_once(self, leaving: Leaving, once: Once) -> Tensor:
        numbers = self._numbers(leaving)
        assert self.activations is not None
        if self._cached is None:
            cached = CachedRelease(
                self.activations,
                cache=once.cache,
                encoder=once.encoder,
                account=RowAccount(ledger=self.ledger, run=_ONCE, training=PartTraining.frozen()),
                stream=self._stream.child(_ONCE),
            )
            self._cached = leaving.name, cached
        name, cached = self._cached
        if name != leaving.name:
            raise ParameterError(
                f"Rows of '{name}' are released once; those of '{leaving.name}' would need a cache and an encoder of "
                "their own. Give the two parts two doors."
            )
        rows = cached.release(once.inputs(numbers), numbers)
        return rows.to(device=leaving.rows.device, dtype=leaving.rows.dtype)

    def _releaser_of(self, leaving: Leaving, mechanism: CutRelease | GradientRelease) -> RowReleaser:
        """One for each sequence of numbers, with a stream of its own."""
        key = (leaving.content, leaving.name, leaving.session, leaving.purpose, *leaving.receivers)
        if isinstance(mechanism, CutRelease):
            mechanism = replace(mechanism, mode="per_step")
        if key not in self._releasers:
            self._releasers[key] = RowReleaser(
                mechanism,
                kind=f"{leaving.content} of {leaving.name}",
                account=self.account(*leaving.receivers),
                stream=self._stream.child(repr(key)),
            )
        return self._releasers[key]

    def _store_of(self, leaving: Leaving) -> LabelStore:
        assert self._labels is not None
        if leaving.name not in self._stores:
            if self._stores and self._labels.path is not None:
                raise ParameterError(
                    f"Labels '{leaving.name}' and {sorted(self._stores)} would share the file {self._labels.path}, "
                    "where a row has one answer. Give different labels doors of their own."
                )
            self._stores[leaving.name] = LabelStore(
                self._labels,
                stream=self._stream.child(f"labels {leaving.name}"),
                ledger=self.ledger,
                run=f"{_ANSWERED}{', '.join(leaving.receivers)}",
            )
        return self._stores[leaving.name]

    def _numbers(self, leaving: Leaving) -> Tensor:
        if leaving.row_numbers is None:
            raise ParameterError(
                f"'{leaving.sender}' does not know which rows its {leaving.content} of '{leaving.name}' are of, and "
                "what is released once a row needs to know. Give the data with its row numbers."
            )
        return leaving.row_numbers


def _is_the_doors(run: str) -> bool:
    return run == _ONCE or run.startswith((_SEEN, _ANSWERED))


def _through_the_clip(rows: Tensor, max_norm: float) -> Callable[[Tensor], Tensor]:
    def pull_back(gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            (found,) = torch.autograd.grad(clip_rows(leaf, max_norm=max_norm), leaf, gradient.to(leaf))
        return found

    return pull_back
