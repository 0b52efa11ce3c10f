"""A ledger in a file: several runs on one dataset, in several processes and over time, add up in one place.

    with LedgerFile("patients.ledger", budget=Budget(epsilon=3.0, delta=1e-5)) as ledger:
        model, optimizer, loader = make_private(model, optimizer, loader, plan, ledger=ledger)
        ...

A release is a line (`ledger_lines` has the format), appended under an exclusive lock and on the disk before the
release leaves. What happens if

- the process is killed: the line is whole, and what it records counts as spent; or it is torn, and the release has not
  left. A torn last line is set aside, in a file beside this one, by whoever comes next.
- the file is edited, cut in the middle, or exchanged for another: refused, and never repaired.
- whole lines are cut from the end: whoever has read them notices (this process; a checkpoint, when it is resumed).

Locks are `flock`: they work between processes, threads and containers of one machine. On network file systems they
depend on the server: NFS 4 has them; a ledger on anything older belongs on one machine.

Public: everything in the file. It says how often data was used, and nothing of what it is.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self, SupportsIndex

from accountants import Event, Interval, NeighboringRelation, PRVAccountant, arguments
from dpdl.account import same_key
from dpdl.budget import Allowance, Budget, composed
from dpdl.errors import LedgerError, ParameterError
from dpdl.journal import Journal
from dpdl.ledger_lines import Content, Header, Returned
from dpdl.process_lock import ProcessLock
from dpdl.tally import Entry, Segment, Tally, refuse_nonsense

__all__ = ["LedgerFile"]

ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE


class LedgerFile:
    """What all runs on one dataset have released, in a file.

    Args:
        path: where; made if there is nothing.
        relation: what neighbouring datasets differ in.
        budget: what all runs may spend together. It is written into a new file and holds for whoever opens that
            later; a stricter one holds for this object.
        reserve: how many steps a run records at once, to wait for the disk that much less often. Those it does not
            take are given back by `give_back`; a crash keeps them spent.

    Raises:
        LedgerError: the file is damaged, not a ledger, of another relation, or under a stricter budget.
        ParameterError: an argument is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        relation: NeighboringRelation | str = ADD_OR_REMOVE,
        budget: Budget | None = None,
        reserve: int = 1,
    ) -> None:
        self.path = Path(path).absolute()  # whatever folder the process goes to later
        self.relation = NeighboringRelation.of(relation)
        self._reserve = arguments.positive_whole("reserve", reserve, remedy="Give a number of steps such as 16.")
        if budget is not None and not isinstance(budget, Budget):
            raise ParameterError(f"budget must be a Budget, got {budget!r}. Give Budget(epsilon=..., delta=...).")
        self._header: Header | None = None
        self._forget()
        self._held: dict[tuple[str, str, str], tuple[Segment, bool]] = {}  # recorded, not yet used; whether repeatable
        self._process = os.getpid()
        self._one_thread = ProcessLock()
        self._journal = Journal(self.path, self._take, forget=self._forget)
        if not self.path.exists():
            self._journal.create(Header(id=secrets.token_hex(16), relation=self.relation, budget=budget))
        with self._journal.locked():
            header = self._read_header()
        self.id: str = header.id
        self.budget = self._agreed(header, budget)
        self._allowance = None if self.budget is None else Allowance(self.budget, self.relation)

    # ── recording ───────────────────────────────────────────────────────────────────────────────────

    def record(
        self,
        event: Event,
        *,
        label: str = "step",
        run: str = "",
        branch: str | None = None,
        number: int | None = None,
        ahead: int = 1,
    ) -> int:
        """Append one release, which must not have left yet. When this returns, the disk has it.

        Args:
            event: what will be released, with the sampling in front of it.
            label: what for.
            run: whose.
            branch: which key draws it; leave it out.
            number: among the releases of this run, branch and label, if the same number is the same release again (a
                run that is repeated under an insecure seed); it is then counted once. By default the next one.
            ahead: how many such releases may follow, this one included: the most that is reserved.

        Returns:
            Its number.

        Raises:
            BudgetExceededError: it would overspend; nothing is recorded.
            LedgerError: the file was damaged, something else was released under that number, or another run draws with
                the same key.
            ParameterError: an argument is out of range.
        """
        with self._one_thread:
            self.claim(event, label=label, run=run, branch=branch, number=number, ahead=ahead)
            held, repeatable = self._held.get((run, branch or "", label), (None, False))
            if held is None or (number is not None and not held.first <= number < held.end):
                assert number is not None
                return number  # the same release again
            used = held.first if number is None else number
            self._hold(held, first=used + 1, count=held.end - used - 1, repeatable=repeatable)
            return used

    def claim(
        self,
        event: Event,
        *,
        label: str = "step",
        run: str = "",
        branch: str | None = None,
        number: int | None = None,
        ahead: int = 1,
    ) -> None:
        """Record a release, arguments as in `record`, that the next `record` of the same is about.

        Raises:
            BudgetExceededError, LedgerError, ParameterError: as `record`.
        """
        refuse_nonsense(event, label=label, run=run, branch=branch or "", number=number, ahead=ahead)
        key = (run, branch or "", label)
        with self._one_thread:
            if os.getpid() != self._process:  # after a fork what was held is the parent's
                self._held, self._process = {}, os.getpid()
            if self._has(event, key, number):
                return
            with self._journal.locked() as file:
                if not self._has(event, key, number):  # others' lines have been read by now
                    self._spend(file, event, key, number, ahead)

    def adopt(self, segments: tuple[Segment, ...]) -> None:
        """Append releases that have happened elsewhere and are not here yet; no budget can undo them.

        Args:
            segments: runs of equal releases, as `Ledger.segments` lists them.
        """
        with self._one_thread, self._journal.locked() as file:
            for segment in segments:
                for piece in self._tally.missing(segment):
                    self._journal.append(file, piece)

    def give_back(self, run: str | None = None) -> None:
        """Take back what was recorded ahead and not used, of one run or of all.

        A run under an insecure seed keeps it: the same numbers may be repeated elsewhere, uncounted.
        """
        with self._one_thread:
            if os.getpid() != self._process:
                return
            for key, (segment, repeatable) in list(self._held.items()):
                if not repeatable and run in (None, segment.run):
                    with self._journal.locked() as file:
                        del self._held[key]  # first: whatever happens now, it is not used any more
                        self._journal.append(file, Returned(segment=segment))

    def __enter__(self) -> Self:
        """The ledger itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()

    def _has(self, event: Event, key: tuple[str, str, str], number: int | None) -> bool:
        """Whether such a release is recorded and may leave."""
        if number is None:
            held, repeatable = self._held.get(key, (None, False))
            return held is not None and held.event == event and not repeatable
        run, branch, label = key
        known = self._tally.event_at(run, branch, label, number)
        if known is not None and known != event:
            raise LedgerError(
                f"Release {number} ('{label}') of the run '{run}' in {self.path} was {known}, not {event}: this is "
                "another run. Start it anew with make_private, without loading the old one's state."
            )
        return known is not None

    def _spend(self, file: int, event: Event, key: tuple[str, str, str], number: int | None, ahead: int) -> None:
        run, branch, label = key
        if (other := self._tally.other_run_of(run, branch)) is not None:
            raise same_key(run, other, self.name)
        if event not in self._tally.counts:
            PRVAccountant(relation=self.relation).compose(event)  # has a proof, or is refused
        if self._allowance is not None:
            self._allowance.refuse(self._tally.counts, event, where=f"the ledger {self.path}")
        held, repeatable = self._held.pop(key, (None, False))
        if held is not None and not repeatable:  # of another event: the run has changed what it does
            self._journal.append(file, Returned(segment=held))
        first = self._tally.next_number(*key) if number is None else number
        segment = Segment(run=run, branch=branch, label=label, event=event, first=first, count=1)
        count = min(self._reserve, ahead)
        while count > 1 and not self._may_reserve(replace(segment, count=count)):
            count //= 2
        self._journal.append(file, replace(segment, count=count))
        self._hold(segment, first=first, count=count, repeatable=number is not None)

    def _may_reserve(self, ahead: Segment) -> bool:
        if self._tally.overlaps(ahead):
            return False
        return self._allowance is None or self._allowance.fits(self._tally.counts, ahead.event, count=ahead.count)

    def _hold(self, of: Segment, *, first: int, count: int, repeatable: bool) -> None:
        self._held.pop(of.key, None)
        if count:
            self._held[of.key] = (replace(of, first=first, count=count), repeatable)

    # ── what there is ───────────────────────────────────────────────────────────────────────────────

    @property
    def name(self) -> str:
        """What to call it in a report."""
        return f"the ledger {self.path.name}"

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All releases, those of the same run, label and kind counted together; reservations count as releases."""
        return self._up_to_date().by_run()

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs that have released something, in the order of their first release."""
        return self._up_to_date().runs

    @property
    def counts(self) -> Mapping[Event, int]:
        """How many releases of each kind, reservations included: all that epsilon is computed from."""
        with self._one_thread:
            return dict(self._up_to_date().counts)

    @property
    def releases(self) -> int:
        """How many releases there were."""
        return self._up_to_date().releases

    def of_run(self, run: str) -> tuple[Segment, ...]:
        """The releases of one run, in order."""
        return self._up_to_date().of_run(run)

    def interval(self, delta: float) -> Interval:
        """A lower and an upper bound on the epsilon that all runs have spent so far at `delta`."""
        return composed(self._up_to_date().counts, self.relation).interval(delta)

    def epsilon(self, delta: float) -> float:
        """An upper bound on the epsilon that all runs have spent so far at `delta`."""
        return self.interval(delta).upper

    def fits(
        self,
        event: Event,
        *,
        label: str = "step",
        run: str = "",
        branch: str | None = None,
        number: int | None = None,
    ) -> bool:
        """Whether `record` with the same arguments would not be refused, as of now. It records nothing.

        Arguments as in `record`.
        """
        refuse_nonsense(event, label=label, run=run, branch=branch or "", number=number)
        key = (run, branch or "", label)
        with self._one_thread:
            if self._allowance is None or self._has(event, key, number):
                return True
            return self._allowance.fits(self._up_to_date().counts, event) or self._has(event, key, number)

    def remaining(
        self,
        event: Event,
        *,
        label: str = "step",
        run: str = "",
        branch: str | None = None,
        number: int | None = None,
    ) -> int | None:
        """How many more releases of `event` fit into the budget, up to a million; None if there is no budget.

        Those that are recorded ahead for this run, branch and label are among them. Arguments as in `record`.
        """
        refuse_nonsense(event, label=label, run=run, branch=branch or "", number=number)
        if self._allowance is None:
            return None
        with self._one_thread:
            counts = self._up_to_date().counts
            held = 0
            if number is None:
                reserved, _ = self._held.get((run, branch or "", label), (None, False))
                held = reserved.count if reserved is not None and reserved.event == event else 0
            else:
                while self._tally.event_at(run, branch or "", label, number + held) == event:
                    held += 1
            return held + self._allowance.remaining(counts, event)

    def _up_to_date(self) -> Tally:
        with self._one_thread, self._journal.locked(exclusive=False):
            return self._tally

    # ── opening ─────────────────────────────────────────────────────────────────────────────────────

    def _forget(self) -> None:
        """All lines will be read again."""
        self._tally = Tally()

    def _take(self, content: Content, number: int) -> None:
        """A line was read, or written."""
        if isinstance(content, Header):
            self._header = content
            return
        if isinstance(content, Returned):
            if not self._tally.holds(content.segment):
                raise self._journal.damaged(f"line {number} gives back what was not there")
            self._tally.remove(content.segment)
            return
        if self._tally.overlaps(content):
            raise self._journal.damaged(f"line {number} has numbers that an earlier one has")
        self._tally.add(content)

    def _read_header(self) -> Header:
        if self._header is None:
            raise self._journal.damaged("it is empty")
        if self._header.relation is not self.relation:
            raise LedgerError(
                f"In the ledger {self.path} neighbouring datasets differ by {self._header.relation.phrase}, here by "
                f"{self.relation.phrase}: their figures cannot be added up. Open it with "
                f"relation={self._header.relation.value!r}, and use such a plan."
            )
        return self._header

    def _agreed(self, header: Header, budget: Budget | None) -> Budget | None:
        if header.budget is None or budget is None:
            return budget or header.budget
        if not budget.is_at_least_as_strict_as(header.budget):
            raise LedgerError(
                f"The ledger {self.path} was made for a budget of {header.budget}; {budget} is weaker. Open it without "
                "a budget, or with a stricter one. Who was promised the old one still has that promise."
            )
        return budget

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise LedgerError(
            f"A ledger file's object cannot be copied or pickled: both would use the steps that one has reserved. Open "
            f"the file again: LedgerFile({str(self.path)!r})."
        )

    def __repr__(self) -> str:
        return f"LedgerFile({str(self.path)!r}, relation={self.relation.value!r}, budget={self.budget!r})"
