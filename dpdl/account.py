"""What a run's ledger can lie within: the releases of all runs on one dataset, in memory or in a file.

`FollowedAccount` is that of the ranks other than the first of a data-parallel run: they read what the first one writes.
"""

from __future__ import annotations

from typing import Protocol

from accountants import Event, Interval, NeighboringRelation
from dpdl.budget import Budget
from dpdl.errors import LedgerError
from dpdl.tally import Segment

__all__ = ["Account", "FollowedAccount", "same_key"]


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

    def claim(self, event: Event, *, label: str, run: str, branch: str | None, number: int | None, ahead: int) -> None:
        """Make sure that `record` with the same arguments will not be refused."""

    def record(
        self, event: Event, *, label: str, run: str, branch: str | None, number: int | None, ahead: int
    ) -> int | None:
        """Append one release; returns its number, None if that is left to who asks."""

    def adopt(self, segments: tuple[Segment, ...]) -> None:
        """Append releases that have happened elsewhere; they cannot be refused."""

    def give_back(self, run: str | None = None) -> None:
        """Take back what was recorded ahead and not used, of one run or of all."""

    def of_run(self, run: str) -> tuple[Segment, ...]:
        """The releases of one run."""

    def interval(self, delta: float) -> Interval:
        """A lower and an upper bound on the epsilon spent so far at `delta`."""

    def fits(self, event: Event, *, label: str, run: str, branch: str | None, number: int | None) -> bool:
        """Whether `record` with the same arguments would not be refused."""

    def remaining(self, event: Event, *, label: str, run: str, branch: str | None, number: int | None) -> int | None:
        """How many more releases of `event` fit; None if there is no budget."""


class FollowedAccount:
    """A dataset's ledger that rank 0 of the run writes and is asked about: this one reads, and records nothing.

    Args:
        account: the same ledger, opened here.
    """

    def __init__(self, account: Account) -> None:
        self._account = account

    @property
    def relation(self) -> NeighboringRelation:
        """What neighbouring datasets differ in."""
        return self._account.relation

    @property
    def budget(self) -> Budget | None:
        """What it holds its releases to."""
        return self._account.budget

    @property
    def name(self) -> str:
        """What to call it in a report."""
        return self._account.name

    @property
    def id(self) -> str | None:
        """What tells it from others for good."""
        return self._account.id

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs that have released something."""
        return self._account.runs

    def claim(self, event: Event, *, label: str, run: str, branch: str | None, number: int | None, ahead: int) -> None:
        """Nothing: rank 0 asks, and its answer is everybody's."""

    def record(
        self, event: Event, *, label: str, run: str, branch: str | None, number: int | None, ahead: int
    ) -> int | None:
        """Nothing: rank 0 records it, once."""
        return number

    def adopt(self, segments: tuple[Segment, ...]) -> None:
        """Nothing: rank 0 does."""

    def give_back(self, run: str | None = None) -> None:
        """Nothing is recorded ahead here."""

    def of_run(self, run: str) -> tuple[Segment, ...]:
        """The releases of one run."""
        return self._account.of_run(run)

    def interval(self, delta: float) -> Interval:
        """A lower and an upper bound on the epsilon spent so far at `delta`."""
        return self._account.interval(delta)

    def fits(self, event: Event, *, label: str, run: str, branch: str | None, number: int | None) -> bool:
        """True: rank 0 is asked instead."""
        return True

    def remaining(self, event: Event, *, label: str, run: str, branch: str | None, number: int | None) -> int | None:
        """How many more releases of `event` fit; None if there is no budget."""
        return self._account.remaining(event, label=label, run=run, branch=branch, number=number)


def same_key(run: str, other: str, where: str) -> LedgerError:
    """The error for two runs under one seed: their noise is not independent, as adding up assumes."""
    return LedgerError(
        f"The run '{run}' draws its noise with the same insecure_seed as the run '{other}' in {where}: their releases "
        "can be subtracted from each other, and the noise is gone. Give this run another seed (or none, which is "
        "secure), or load the other one's checkpoint to go on with it."
    )
