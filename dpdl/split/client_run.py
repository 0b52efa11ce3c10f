"""What a party keeps for each client that it trains with: the plan, and what is spent on that client's records.

Over restarts the ledger of the data is what knows: a process that goes on under the same name counts all steps of the
same kind that others have taken, whether it was given their state or not.
"""

from __future__ import annotations

from dataclasses import dataclass

from accountants import Composed, Event, Gaussian, NeighboringRelation
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.plan import PrivacyPlan
from dpdl.run_state import STEP, RunPlan, RunState, new_run_id, step_event
from dpdl.secure_random import RandomStream
from dpdl.split.clip import Clip
from dpdl.split.clipped_parts import ClippedParts
from dpdl.tally import Segment

__all__ = ["Client", "RowsPickedElsewhere", "begun_run"]


@dataclass(frozen=True, kw_only=True)
class RowsPickedElsewhere:
    """A plan's steps for a party whose records somebody else draws: it cannot know how, so nothing is amplified.

    Attributes:
        plan: the run's.
    """

    plan: PrivacyPlan

    @property
    def steps(self) -> int:
        """How many there are at most."""
        return self.plan.steps

    @property
    def relation(self) -> str:
        """What neighbouring datasets differ in."""
        return self.plan.relation

    def event(self, steps: int, /) -> Event:
        """What that many steps release of a record that is in all of them."""
        return Gaussian(self.plan.noise_multiplier) * steps


@dataclass(frozen=True, kw_only=True)
class Client:
    """One client that a party trains with: its plan, its clip, and what was spent on its records.

    Attributes:
        name: the client's.
        plan: what all parties are held to with it.
        clip: how rows are clipped.
        run: ledger, noise and position of this party for this client.
        agreement: tells these settings from all others.
    """

    name: str
    plan: PrivacyPlan
    clip: Clip
    run: RunState
    agreement: str

    def clipped_parts(self) -> ClippedParts:
        """An empty sum."""
        return ClippedParts(self.clip, sensitivity=self.plan.max_grad_norm)

    @property
    def spent(self) -> Event:
        """All that is known to be released of these records: where there is a ledger of the data, all that it has."""
        whole = self.run.ledger.within
        entries = whole.entries if isinstance(whole, (Ledger, LedgerFile)) else self.run.ledger.entries
        return Composed(tuple(entry.event * entry.count for entry in entries))

    def epsilon(self, delta: float) -> float:
        """An upper bound on the epsilon of `spent` at `delta`."""
        return (self.run.ledger.within or self.run.ledger).interval(delta).upper


def begun_run(
    plan: PrivacyPlan,
    *,
    name: str,
    picked_elsewhere: bool,
    within: Ledger | LedgerFile | None,
    randomness: RandomStream,
) -> RunState:
    """A run at its beginning, or where the ledger of the data says that it is.

    Args:
        plan: what it is held to.
        name: whose run at which party.
        picked_elsewhere: whether the records are this party's, and another party draws them.
        within: the ledger of the data, if there is one.
        randomness: of the run.

    Raises:
        LedgerError: the ledger is of another neighbouring relation.
    """
    held_to: RunPlan = RowsPickedElsewhere(plan=plan) if picked_elsewhere else plan
    ledger = Ledger(relation=NeighboringRelation(plan.relation), within=within, run=new_run_id(name))
    if within is not None:
        ledger.adopt(_earlier_steps(within, name, step_event(held_to), branch=randomness.name))
    return RunState(held_to, randomness=randomness, ledger=ledger)


def _earlier_steps(ledger: Ledger | LedgerFile, name: str, event: Event, *, branch: str) -> tuple[Segment, ...]:
    """The steps that other processes have taken of what goes by this name, as the data's ledger has them.

    Not those of this very seed: they are the next steps of a run that is resumed, or the ledger refuses them.
    """
    return tuple(
        segment
        for run in ledger.runs
        if run.rpartition(" ")[0] == name
        for segment in ledger.of_run(run)
        if segment.label == STEP and segment.event == event and segment.branch != branch
    )
