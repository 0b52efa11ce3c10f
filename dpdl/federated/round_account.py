"""A client's ledger, asked for whole rounds: all of a round's steps fit, or none is taken.

In a file, the steps of a round are recorded at once, before the first, in one line. Then

- the round is taken: nothing more is written. A loop that stops earlier has spent them all, because where it stopped
  may say something of the data;
- the round ends with an error, or the process is killed: all of them stay spent. How many were taken may say
  something of the data as well.

In memory there is nothing to outlive the process: the steps are looked for in advance and recorded one by one, and
those that an error has left, after it.
Another thread that records in the same ledger meanwhile can take what this round needs; the round then breaks off.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from accountants import Event, NeighboringRelation
from dpdl.budget import Allowance
from dpdl.errors import BudgetExceededError, LedgerError, ParameterError
from dpdl.federated.client_report import is_round
from dpdl.federated.messages import FitRequest
from dpdl.federated.unanswered import Mark, unanswered_rounds_of
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.tally import Segment

__all__ = ["RoundAccount"]

_MOST = 10**15  # steps recorded at once: whatever a round has


class RoundAccount:
    """What a client has spent, and may spend.

    Args:
        ledger: the client's; a path is that of a ledger file, made if there is none.
        relation: what neighbouring datasets differ in.

    Attributes:
        ledger: as given, or the file at that path.
        within: the same, with reservations of its own.
        marks: of rounds on the ledger's data that are under way, or were not answered.

    Raises:
        LedgerError: the ledger is of another relation, or its file is damaged.
        ParameterError: it is none.
    """

    def __init__(self, ledger: Ledger | LedgerFile | str | os.PathLike[str], *, relation: NeighboringRelation) -> None:
        opened = LedgerFile(ledger, relation=relation) if isinstance(ledger, (str, os.PathLike)) else ledger
        if not isinstance(opened, (Ledger, LedgerFile)):
            raise LedgerError(
                f"ledger must be a Ledger, a LedgerFile or the path of one, got {type(opened).__name__}. What this "
                'data has spent must be kept somewhere: give LedgerFile("name.ledger", budget=Budget(...)).'
            )
        if opened.relation is not relation:
            raise LedgerError(
                f"In {opened.name} neighbouring datasets differ by {opened.relation.phrase}, here by "
                f"{relation.phrase}: their figures cannot be added up. Give a ledger with relation={relation.value!r}."
            )
        self.ledger: Ledger | LedgerFile = opened
        self.within: Ledger | LedgerFile = opened
        if isinstance(opened, LedgerFile):  # the same file, with reservations of its own
            self.within = LedgerFile(opened.path, relation=relation, budget=opened.budget, reserve=_MOST)
        self.marks = unanswered_rounds_of(opened)
        self._allowance = None if opened.budget is None else Allowance(opened.budget, relation)

    @contextlib.contextmanager
    def round(self, run: str, *, spend: Callable[[], None]) -> Iterator[Mark]:
        """A round whose releases are claimed: marked while it is under way; if it ends otherwise than by its last
        statement, all of it is spent, because data may have been looked at.

        Args:
            run: the round's name.
            spend: has all of it recorded.

        Raises:
            LedgerError: the mark cannot be written; what was claimed is given back.
        """
        begun = False
        try:
            with self.marks.under_way(run) as mark:
                begun = True
                yield mark
        except BaseException:
            if begun:
                spend()
            else:
                self.give_back(run)
            raise

    def claim(self, event: Event, count: int, *, label: str, run: str, branch: str, repeatable: bool) -> None:
        """Make sure that `count` releases of a run fit into the budget, and in a file record them.

        Args:
            event: one release.
            count: how many.
            label, run, branch: their address.
            repeatable: whether they are drawn from a seed, so that the same address is the same release again.

        Raises:
            BudgetExceededError: they do not all fit; nothing is recorded.
            LedgerError: the file is damaged, or another run draws with the same key.
        """
        missing = count - (self._recorded(label, run, branch) if repeatable else 0)
        if missing > 0:
            self.refuse_overspending(event, missing)
        number = 0 if repeatable else None
        try:
            self.within.claim(event, label=label, run=run, branch=branch, number=number, ahead=count)
        except BudgetExceededError as error:
            raise _taken(count) from error
        if isinstance(self.within, LedgerFile) and self._recorded(label, run, branch) < count:
            self.within.give_back(run)
            raise _taken(count)

    def refuse_overspending(self, event: Event, count: int) -> None:
        """Raise unless that many more releases fit into the budget; nothing is recorded.

        Raises:
            BudgetExceededError: they do not.
        """
        if self._allowance is None:
            return
        self._allowance.refuse(self.ledger.counts, event, count=count, where="the client's ledger")

    def refuse_same_noise(self, request: FitRequest, run: str, branch: str) -> None:
        """Raise if a round of that number was begun with another request: under a seed both have the same noise.

        Raises:
            ParameterError: it was.
        """
        others = [other for other in self.within.runs if other != run and is_round(other, request)]
        if any(segment.branch == branch for other in others for segment in self.within.of_run(other)):
            raise ParameterError(
                f"Round {request.round} of '{request.federation}' was begun before, with other weights or settings. "
                "Under insecure_seed it would get the same noise, which could then be subtracted. Ask for another "
                "round, or leave the seed out."
            )

    def spend(self, event: Event, count: int, *, label: str, run: str, branch: str) -> None:
        """Have all that was claimed recorded, whatever was taken of it."""
        self.within.adopt((Segment(run=run, branch=branch, label=label, event=event, first=0, count=count),))

    def give_back(self, run: str) -> None:
        """Take back what was recorded for a run that has not touched data."""
        self.within.give_back(run)

    def _recorded(self, label: str, run: str, branch: str) -> int:
        of_run = self.within.of_run(run)
        return sum(each.count for each in of_run if each.label == label and each.branch == branch)


def _taken(count: int) -> BudgetExceededError:
    return BudgetExceededError(
        f"Somebody else has just taken from the client's ledger what these {count} releases needed. Nothing was "
        "released."
    )
