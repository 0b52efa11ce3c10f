"""The ledger: which releases have happened, what they add up to, and whether another one is within the budget.

    data = Ledger(relation=NeighboringRelation.ADD_OR_REMOVE, budget=Budget(epsilon=3.0, delta=1e-5))
    data.record(Gaussian(20.0), label="mean")              # refused if it would overspend
    model, optimizer, loader = make_private(model, optimizer, loader, plan, ledger=data)

Ledgers nest: a run's own ledger (`optimizer.ledger`) lies within its dataset's, which may be a `LedgerFile`. What is
recorded in the inner one is recorded in the outer one first, and refused by whichever budget is narrower.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn, SupportsIndex

from accountants import Composed, Event, Interval, NeighboringRelation, PRVAccountant
from dpdl.account import Account, same_key
from dpdl.budget import Allowance, Budget, composed
from dpdl.errors import CheckpointError, LedgerError, ParameterError
from dpdl.process_lock import ProcessLock
from dpdl.tally import Entry, Segment, Tally, refuse_nonsense

__all__ = ["Entry", "Ledger"]

_SCHEMA = "dpdl.ledger/3"
_STEP, _OTHER = "step", "release"  # the labels of what nobody gave one, in a dataset's ledger and in a run's


class Ledger:
    """An append-only record of the releases made from one dataset, or by one run on it.

    It holds what happened, not what was planned. A release is recorded before it leaves the private
    side, so that whatever goes wrong afterwards, nothing released is unaccounted for.

    Args:
        relation: what neighbouring datasets differ in.
        budget: what the releases may spend together; None for no limit.
        within: the dataset's ledger, if this is a run's.
        run: what the run is called in it. In its own ledger a run has no name: two equal runs have equal ledgers.

    Any number of threads may use one.

    Raises:
        LedgerError: the ledger that this one lies within is of another relation.
    """

    id = None  # in memory: gone with its process

    def __init__(
        self,
        *,
        relation: NeighboringRelation,
        budget: Budget | None = None,
        within: Account | None = None,
        run: str = "",
    ) -> None:
        self.relation = NeighboringRelation.of(relation)
        self.budget = budget
        self.within = within
        self.run = run
        self._branch = ""  # of what is recorded without naming one
        self._reserved: str | None = None  # a label that is the run's own
        self._lock = ProcessLock()
        self._process = os.getpid()
        self._tally = Tally()
        self._allowance = None if budget is None else Allowance(budget, self.relation)
        if within is not None and within.relation is not self.relation:
            raise LedgerError(
                f"The run's neighbouring datasets differ by {self.relation.phrase}, those of its ledger by "
                f"{within.relation.phrase}: their figures cannot be added up. Use a plan with "
                f"relation={within.relation.value!r}, or another ledger."
            )

    def hold_to(self, budget: Budget) -> None:
        """Hold further releases to a budget of this ledger's own.

        Raises:
            LedgerError: it is weaker than the one that is there.
        """
        with self._lock:
            if self.budget is not None and not budget.is_at_least_as_strict_as(self.budget):
                raise LedgerError(
                    f"{self.name} is held to a budget of {self.budget}; {budget} is weaker. Give a stricter one."
                )
            self.budget, self._allowance = budget, Allowance(budget, self.relation)

    def reserve(self, label: str) -> None:
        """Let only the run that this ledger is of record under `label`, by naming the branch.

        All that others record in it is on a branch of its own, drawn here: it was not drawn by the run, so a process
        that goes on from the same checkpoint never makes the same release again.
        """
        self._reserved, self._branch = label, secrets.token_hex(8)

    # ── recording ───────────────────────────────────────────────────────────────────────────────────

    def record(
        self,
        event: Event,
        *,
        label: str | None = None,
        run: str = "",
        branch: str | None = None,
        number: int | None = None,
        ahead: int = 1,
    ) -> int:
        """Append one release, which must not have left yet.

        Args:
            event: what will be released, with the sampling in front of it.
            label: what for; "step" if nothing is said, and in a run's own ledger "release".
            run: of several runs in one ledger; leave it out in a run's own.
            branch: which key draws it; leave it out.
            number: among the releases of this run, branch and label, if the same number is the same release again; it
                is then counted once. By default the next one.
            ahead: how many such releases may follow; a ledger file may record some of them at once.

        Returns:
            Its number.

        Raises:
            BudgetExceededError: it would overspend this ledger's budget or one that it lies within.
            LedgerError: something else was released under that number, or another run draws with the same key.
            ParameterError: an argument is out of range, or the label is the run's own. In all cases nothing is
                recorded.
        """
        with self._lock:
            label = self._label(label)
            self._refuse_the_runs_own(label, branch, number)
            branch = self._branch if branch is None else branch
            if number is not None and not self._is_new(event, label, run, branch, number, ahead):
                return number
            self._refuse(event, label, run, branch, number, ahead)
            at = number
            if self.within is not None:
                outer = run or self.run
                at = self.within.record(event, label=label, run=outer, branch=branch, number=number, ahead=ahead)
            if at is None or self._tally.event_at(run, branch, label, at) is not None:
                at = self._tally.next_number(run, branch, label)
            self._tally.add(Segment(run=run, branch=branch, label=label, event=event, first=at, count=1))
            return at

    def claim(
        self,
        event: Event,
        *,
        label: str | None = None,
        run: str = "",
        branch: str | None = None,
        number: int | None = None,
        ahead: int = 1,
    ) -> None:
        """Raise what `record` would, now; and let no other process take what this release needs.

        Arguments as in `record`.

        Args:
            ahead: how many releases to make room for at once; a ledger in memory needs no more than this one.

        Raises:
            BudgetExceededError, LedgerError, ParameterError: as for `record`.
        """
        with self._lock:
            label = self._label(label)
            self._refuse_the_runs_own(label, branch, number)
            branch = self._branch if branch is None else branch
            if not self._is_new(event, label, run, branch, number, ahead):
                return
            self._refuse(event, label, run, branch, number, ahead)
            if self.within is not None:
                self.within.claim(event, label=label, run=run or self.run, branch=branch, number=number, ahead=ahead)

    def adopt(self, segments: tuple[Segment, ...]) -> None:
        """Append releases that have happened elsewhere and are not here yet; no budget can undo them.

        Args:
            segments: runs of equal releases, as `segments` lists them.
        """
        with self._lock:
            if self.within is not None:
                self.within.adopt(tuple(replace(segment, run=segment.run or self.run) for segment in segments))
            for segment in segments:
                for piece in self._tally.missing(segment):
                    self._tally.add(piece)

    def give_back(self, run: str | None = None) -> None:
        """Nothing is recorded ahead in memory, for whichever run."""

    def _label(self, label: str | None) -> str:
        if label is not None:
            return label
        return _STEP if self._reserved is None else _OTHER

    def _refuse_the_runs_own(self, label: str, branch: str | None, number: int | None) -> None:
        """Only the run itself, which names its branch, counts its steps, and knows which of them are the same again."""
        if self._reserved is None or branch is not None:
            return
        if label == self._reserved:
            raise ParameterError(
                f"The label {label!r} is for the run's own steps, which optimizer.step() records. Say what this "
                'release is: record(event, label="mean of the ages").'
            )
        if number is not None:
            raise ParameterError(
                f"number {number}: what is recorded in a run's own ledger is a new release each time. Leave it out."
            )

    def _is_new(self, event: Event, label: str, run: str, branch: str, number: int | None, ahead: int = 1) -> bool:
        refuse_nonsense(event, label=label, run=run, branch=branch, number=number, ahead=ahead)
        known = None if number is None else self._tally.event_at(run, branch, label, number)
        if known is not None and known != event:
            raise LedgerError(
                f"Release {number} ('{label}') of the run '{run}' was {known}, not {event}: this is another run. "
                "Start it without the name of the old one."
            )
        return known is None

    def _refuse(self, event: Event, label: str, run: str, branch: str, number: int | None, ahead: int) -> None:
        refuse_nonsense(event, label=label, run=run, branch=branch, number=number, ahead=ahead)
        if os.getpid() != self._process:
            raise LedgerError(
                f"{self.name} was made in another process: what is recorded here would not be known there. Record in "
                "the process that made it, or share a LedgerFile between processes."
            )
        if (other := self._tally.other_run_of(run, branch)) is not None:
            raise same_key(run or self.run, other, self.name)
        if event not in self._tally.counts:
            PRVAccountant(relation=self.relation).compose(event)  # has a proof, or is refused
        if self._allowance is not None:
            self._allowance.refuse(self._tally.counts, event, where=self.name)

    # ── what there is ───────────────────────────────────────────────────────────────────────────────

    @property
    def name(self) -> str:
        """What to call it in a report."""
        return f"the run '{self.run}'" if self.run else "the ledger"

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All releases, in order, equal neighbours counted together."""
        return self._tally.in_order()

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs that have released something, in the order of their first release."""
        return self._tally.runs

    @property
    def counts(self) -> Mapping[Event, int]:
        """How many releases of each kind."""
        return self._tally.counts

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All releases with their addresses, in order."""
        return self._tally.segments

    @property
    def releases(self) -> int:
        """How many releases there were."""
        return self._tally.releases

    def count(self, label: str) -> int:
        """How many releases there were under a label."""
        return self._tally.labelled(label)

    def next_number(self, branch: str, label: str) -> int:
        """The number of the run's next release of `label` on `branch`, from 0."""
        return self._tally.next_number("", branch, label)

    def of_run(self, run: str) -> tuple[Segment, ...]:
        """The releases of one run, in order."""
        return self._tally.of_run(run)

    def lacks(self, segments: tuple[Segment, ...]) -> int:
        """How many of these releases are not here.

        Args:
            segments: as in `adopt`.
        """
        return sum(piece.count for segment in segments for piece in self._tally.missing(segment))

    @property
    def event(self) -> Event:
        """The composition of all releases."""
        return Composed(tuple(entry.event * entry.count for entry in self.entries))

    def interval(self, delta: float) -> Interval:
        """A lower and an upper bound on the epsilon spent so far at `delta`."""
        with self._lock:
            counts = dict(self._tally.counts)
        return composed(counts, self.relation).interval(delta)

    def epsilon(self, delta: float) -> float:
        """An upper bound on the epsilon spent so far at `delta`; 0 before the first release."""
        return self.interval(delta).upper

    def fits(
        self,
        event: Event,
        *,
        label: str | None = None,
        run: str = "",
        branch: str | None = None,
        number: int | None = None,
    ) -> bool:
        """Whether one more release is within the budgets; arguments as in `record`. It records nothing."""
        with self._lock:
            label, branch = self._label(label), self._branch if branch is None else branch
            if not self._is_new(event, label, run, branch, number):
                return True
            if self._allowance is not None and not self._allowance.fits(self._tally.counts, event):
                return False
            if self.within is None:
                return True
            return self.within.fits(event, label=label, run=run or self.run, branch=branch, number=number)

    def remaining(
        self,
        event: Event,
        *,
        label: str | None = None,
        run: str = "",
        branch: str | None = None,
        number: int | None = None,
    ) -> int | None:
        """How many more releases of `event` fit into the budgets, up to a million; None if there is no budget.

        Arguments as in `record`: what the run has recorded ahead is among them.
        """
        with self._lock:
            label, branch = self._label(label), self._branch if branch is None else branch
            self._is_new(event, label, run, branch, number)
            own = None if self._allowance is None else self._allowance.remaining(self._tally.counts, event)
            outer = None
            if self.within is not None:
                outer = self.within.remaining(event, label=label, run=run or self.run, branch=branch, number=number)
        known = [n for n in (own, outer) if n is not None]
        return min(known) if known else None

    # ── JSON ────────────────────────────────────────────────────────────────────────────────────────

    def to_json(self) -> str:
        """The ledger as JSON, with its schema; not what it lies within."""
        return json.dumps(
            {
                "schema": _SCHEMA,
                "relation": self.relation.value,
                "budget": None if self.budget is None else self.budget.to_dict(),
                "entries": [
                    {
                        "event": json.loads(segment.event.to_json()),
                        "count": segment.count,
                        "label": segment.label,
                        "run": segment.run,
                        "branch": segment.branch,
                        "first": segment.first,
                    }
                    for segment in self._tally.segments
                ],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """The ledger that `to_json` wrote.

        Raises:
            CheckpointError: it is damaged, or something else.
        """
        try:
            values = json.loads(text)
            if values["schema"] != _SCHEMA:
                raise CheckpointError(f"Not a ledger: schema {values['schema']!r}, expected {_SCHEMA!r}.")
            budget = None if values["budget"] is None else Budget.from_dict(values["budget"])
            ledger = cls(relation=NeighboringRelation(values["relation"]), budget=budget)
            for entry in values["entries"]:
                ledger._tally.add(_segment(entry, ledger._tally))
        except (ValueError, KeyError, TypeError) as error:  # JSON errors and ParameterError are ValueErrors
            raise CheckpointError(f"Not a ledger: {error!r}. Resume from an undamaged checkpoint.") from error
        return ledger

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise _no_copies()

    def __copy__(self) -> NoReturn:
        raise _no_copies()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise _no_copies()


def _no_copies() -> LedgerError:
    return LedgerError(
        "A ledger cannot be copied or pickled: each copy would know half of what is spent. Share the object, or "
        "between processes a LedgerFile; to look at what it holds elsewhere, take Ledger.from_json(ledger.to_json())."
    )


def _segment(entry: dict[str, Any], tally: Tally) -> Segment:
    run, branch, label = entry["run"], entry["branch"], entry["label"]
    first, count = entry["first"], entry["count"]
    event = Event.from_json(json.dumps(entry["event"]))
    refuse_nonsense(event, label=label, run=run, branch=branch)
    if type(count) is not int or count < 1 or type(first) is not int or first < 0:
        raise CheckpointError(f"Not a ledger: count {count!r} and first number {first!r} of an entry.")
    segment = Segment(run=run, branch=branch, label=label, event=event, first=first, count=count)
    if tally.overlaps(segment):
        raise CheckpointError(f"Not a ledger: two entries of run {run!r} share the number {first}.")
    return segment
