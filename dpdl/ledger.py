"""The ledger: which releases have happened, what they add up to, and whether another one is within the budget.

    data = Ledger(relation=NeighboringRelation.ADD_OR_REMOVE, budget=Budget(epsilon=3.0, delta=1e-5))
    data.record(Gaussian(20.0), label="mean")              # refused if it would overspend
    model, optimizer, loader = make_private(model, optimizer, loader, plan, ledger=data)

Ledgers nest: a run's own ledger (`optimizer.ledger`) lies within its dataset's, which may be a `LedgerFile`. What is
recorded in the inner one is recorded in the outer one first, and refused by whichever budget is narrower.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from accountants import Composed, Event, Interval, NeighboringRelation, PRVAccountant
from dpdl.budget import Allowance, Budget, composed
from dpdl.errors import CheckpointError, LedgerError, ParameterError
from dpdl.tally import Entry, Segment, Tally, amounts

__all__ = ["Account", "Entry", "Ledger"]

_SCHEMA = "dpdl.ledger/2"


class Account(Protocol):
    """What a ledger can lie within: the releases from one dataset, by whatever run."""

    @property
    def relation(self) -> NeighboringRelation:
        """What neighbouring datasets differ in."""

    @property
    def budget(self) -> Budget | None:
        """What it holds its releases to."""

    @property
    def name(self) -> str:
        """What to call it in a report."""

    @property
    def id(self) -> str | None:
        """What tells it from others for good; None if it does not outlive its process."""

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs that have released something."""

    def claim(self, event: Event, *, label: str, run: str, number: int | None, ahead: int) -> None:
        """Make sure that `record` with the same arguments will not be refused."""

    def record(
        self, event: Event, *, label: str = "step", run: str = "", number: int | None = None, ahead: int = 1
    ) -> None:
        """Append one release."""

    def adopt(self, segments: tuple[Segment, ...]) -> None:
        """Append releases that have happened elsewhere; they cannot be refused."""

    def of_run(self, run: str) -> tuple[Segment, ...]:
        """The releases of one run."""

    def interval(self, delta: float) -> Interval:
        """A lower and an upper bound on the epsilon spent so far at `delta`."""

    def fits(self, event: Event, *, label: str = "step", run: str = "", number: int | None = None) -> bool:
        """Whether `record` with the same arguments would not be refused."""

    def remaining(self, event: Event, *, label: str = "step", run: str = "", number: int | None = None) -> int | None:
        """How many more releases of `event` fit; None if there is no budget."""


class Ledger:
    """An append-only record of the releases made from one dataset, or by one run on it.

    It holds what happened, not what was planned. A release is recorded before it leaves the private
    side, so that whatever goes wrong afterwards, nothing released is unaccounted for.

    Args:
        relation: what neighbouring datasets differ in.
        budget: what the releases may spend together; None for no limit.
        within: the dataset's ledger, if this is a run's.
        run: what the run is called in it. In its own ledger a run has no name: two equal runs have equal ledgers.

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
        self.repeatable = False  # whether the same number is the same release again: set by a run with insecure_seed
        self._tally = Tally()
        self._allowance = None if budget is None else Allowance(budget, self.relation)
        if within is not None and within.relation is not self.relation:
            raise LedgerError(
                f"The run's neighbouring datasets differ by {self.relation.phrase}, those of its ledger by "
                f"{within.relation.phrase}: their figures cannot be added up. Use a plan with "
                f"relation={within.relation.value!r}, or another ledger."
            )

    # ── recording ───────────────────────────────────────────────────────────────────────────────────

    def record(
        self, event: Event, *, label: str = "step", run: str = "", number: int | None = None, ahead: int = 1
    ) -> None:
        """Append one release, which must not have left yet.

        Args:
            event: what will be released, with the sampling in front of it.
            label: what for.
            run: of several runs in one ledger; leave it out in a run's own.
            number: among the run's releases of this label, if the same number is the same release again; it is then
                counted once. By default the next one.
            ahead: how many such releases may follow; a ledger file may record some of them at once.

        Raises:
            BudgetExceededError: it would overspend this ledger's budget or one that it lies within.
            LedgerError: something else was released under that number. In all cases nothing is recorded.
        """
        if not self._is_new(event, label, run, number):
            return
        self._refuse(event)
        following = self._tally.next_number(run, label)
        if self.within is not None:
            same = following if self.repeatable else None
            self.within.record(event, label=label, run=run or self.run, number=same, ahead=ahead)
        at = following if number is None else number
        self._tally.add(Segment(run=run, label=label, event=event, first=at, count=1))

    def claim(
        self, event: Event, *, label: str = "step", run: str = "", number: int | None = None, ahead: int = 1
    ) -> None:
        """Raise what `record` would, now; and let no other process take what this release needs.

        Raises:
            BudgetExceededError: as for `record`.
        """
        if not self._is_new(event, label, run, number):
            return
        self._refuse(event)
        if self.within is not None:
            same = self._tally.next_number(run, label) if self.repeatable else None
            self.within.claim(event, label=label, run=run or self.run, number=same, ahead=ahead)

    def adopt(self, segments: tuple[Segment, ...]) -> None:
        """Append releases that have happened elsewhere and are not here yet; no budget can undo them."""
        for segment in segments:
            for piece in self._tally.missing(segment):
                self._tally.add(piece)

    def catch_up(self, elsewhere: tuple[Segment, ...]) -> None:
        """Append the releases of this run that another record has more of; numbers there may differ from those here."""
        here = amounts(self.segments)
        for (label, event), count in amounts(elsewhere).items():
            if (more := count - here.get((label, event), 0)) > 0:
                first = self._tally.next_number("", label)
                self._tally.add(Segment(run="", label=label, event=event, first=first, count=more))

    def _is_new(self, event: Event, label: str, run: str, number: int | None) -> bool:
        _refuse_nonsense(event, label, run)
        known = None if number is None else self._tally.event_at(run, label, number)
        if known is not None and known != event:
            raise LedgerError(
                f"Release {number} ('{label}') of the run '{run}' was {known}, not {event}: this is another run. "
                "Start it without the name of the old one."
            )
        return known is None

    def _refuse(self, event: Event) -> None:
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

    def of_run(self, run: str) -> tuple[Segment, ...]:
        """The releases of one run, in order."""
        return self._tally.of_run(run)

    @property
    def event(self) -> Event:
        """The composition of all releases."""
        return Composed(tuple(entry.event * entry.count for entry in self.entries))

    def interval(self, delta: float) -> Interval:
        """A lower and an upper bound on the epsilon spent so far at `delta`."""
        return composed(self._tally.counts, self.relation).interval(delta)

    def epsilon(self, delta: float) -> float:
        """An upper bound on the epsilon spent so far at `delta`; 0 before the first release."""
        return self.interval(delta).upper

    def fits(self, event: Event, *, label: str = "step", run: str = "", number: int | None = None) -> bool:
        """Whether one more release is within the budgets; arguments as in `record`. It records nothing."""
        if not self._is_new(event, label, run, number):
            return True
        if self._allowance is not None and not self._allowance.fits(self._tally.counts, event):
            return False
        if self.within is None:
            return True
        same = self._tally.next_number(run, label) if self.repeatable else None
        return self.within.fits(event, label=label, run=run or self.run, number=same)

    def remaining(self, event: Event, *, label: str = "step", run: str = "", number: int | None = None) -> int | None:
        """How many more releases of `event` fit into the budgets, up to a million; None if there is no budget.

        Arguments as in `record`: what the run has recorded ahead is among them.
        """
        own = None if self._allowance is None else self._allowance.remaining(self._tally.counts, event)
        outer = None
        if self.within is not None:
            same = self._tally.next_number(run, label) if self.repeatable else None
            outer = self.within.remaining(event, label=label, run=run or self.run, number=same)
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


def _segment(entry: dict[str, Any], tally: Tally) -> Segment:
    run, label, first, count = entry["run"], entry["label"], entry["first"], entry["count"]
    event = Event.from_json(json.dumps(entry["event"]))
    _refuse_nonsense(event, label, run)
    if type(count) is not int or count < 1 or type(first) is not int or first < 0:
        raise CheckpointError(f"Not a ledger: count {count!r} and first number {first!r} of an entry.")
    segment = Segment(run=run, label=label, event=event, first=first, count=count)
    if tally.overlaps(segment):
        raise CheckpointError(f"Not a ledger: two entries of run {run!r} share the number {first}.")
    return segment


def _refuse_nonsense(event: object, label: object, run: object) -> None:
    if not isinstance(event, Event):
        raise ParameterError(f"A ledger records events (accountants.Gaussian(...), ...), got {event!r}.")
    if not isinstance(label, str) or not label or not isinstance(run, str):
        raise ParameterError(f"label and run of a release are texts, got {label!r} and {run!r}.")
