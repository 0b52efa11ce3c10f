"""How far a private run has come: its ledger, its random streams, its place in the pass over the data."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

from accountants import Event, NeighboringRelation
from accountants.events import Repeated
from dpdl.budget import Budget
from dpdl.errors import CheckpointError, ParameterError, PlanExhaustedError
from dpdl.ledger import Account, Ledger
from dpdl.plan import PrivacyPlan
from dpdl.secure_random import RandomStream
from dpdl.tally import amounts

__all__ = ["STEP", "RunState", "new_run_id", "step_event"]

STEP = "step"  # the label of training steps


class RunState:
    """All that changes from step to step besides weights and optimizer.

    A step's number (how many the run has taken) addresses both its draw and its noise, so there is no
    generator position that could be lost or rewound.

    Args:
        plan: what the run is held to.
        randomness: the root of its streams.
        ledger: the run's releases so far; it may lie within the dataset's ledger.
        steps_in_pass: steps taken in the current pass over the loader.
    """

    def __init__(
        self, plan: PrivacyPlan, *, randomness: RandomStream, ledger: Ledger | None = None, steps_in_pass: int = 0
    ) -> None:
        self.plan = plan
        self.ledger = ledger or Ledger(relation=NeighboringRelation(plan.relation), run=new_run_id())
        self.ledger.repeatable = not randomness.secure
        self.steps_in_pass = steps_in_pass
        self._event = step_event(plan)
        self._kept: dict[str, Any] | None = None  # of a saved state: which ledger it was kept in
        self._randomness = randomness
        self.noise = randomness.child("noise")
        self.sampling = randomness.child("sampling")

    @property
    def secure(self) -> bool:
        """Whether noise and sampling come from a key that nobody knows."""
        return self._randomness.secure

    @property
    def steps_taken(self) -> int:
        """Training steps so far; other releases are in the ledger, too, and are not among them."""
        return self.ledger.count(STEP)

    def take_key(self, key: bytes) -> None:
        """Go on with this key: the same for all processes of a run, and for no other use."""
        self._randomness = RandomStream(key)
        self.noise = self._randomness.child("noise")
        self.sampling = self._randomness.child("sampling")

    def refuse_overspending(self) -> None:
        """Raise unless one more step is within the plan and all budgets, before anything is spent.

        If it is, and other runs share the ledger, none of them can take what this step needs.

        Raises:
            PlanExhaustedError: the plan has no step left.
            BudgetExceededError: the step would overspend.
            LedgerError: the ledger's file was damaged.
        """
        if self.steps_taken >= self.plan.steps:
            raise PlanExhaustedError(
                f"The plan's {self.plan.steps} steps are taken. Make a plan with more steps before training."
            )
        self.ledger.claim(self._event, label=STEP, ahead=self.plan.steps - self.steps_taken)

    def next_step(self) -> int:
        """Record one more step and return its number, from 0.

        Raises:
            BudgetExceededError, LedgerError: as `refuse_overspending`; nothing was recorded.
        """
        step = self.steps_taken
        self.ledger.record(self._event, label=STEP, ahead=self.plan.steps - step)
        self.steps_in_pass += 1
        return step

    # ── saving and resuming ─────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """Plain values. A secure stream's key is not among them."""
        account = self.ledger.within
        kept = None
        if account is not None:
            kept = {"id": account.id, "budget": None if account.budget is None else account.budget.to_dict()}
        return {
            "run": self.ledger.run,
            "ledger": self.ledger.to_json(),
            "kept_in": kept,
            "steps_in_pass": self.steps_in_pass,
            "randomness": self._randomness.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], *, plan: PrivacyPlan) -> RunState:
        """The state that `state_dict` returned; a secure run goes on with a fresh key.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            ledger = Ledger.from_json(state["ledger"])
            ledger.run = state["run"]
            kept = state["kept_in"]
            steps_in_pass = state["steps_in_pass"]
            randomness = RandomStream.from_state_dict(state["randomness"])
        except KeyError as error:
            raise CheckpointError(f"The saved run has no {error}. Resume from an undamaged checkpoint.") from error
        if type(steps_in_pass) is not int or not 0 <= steps_in_pass <= ledger.count(STEP):
            raise CheckpointError(f"The saved run is damaged: steps_in_pass {steps_in_pass!r}.")
        if not isinstance(ledger.run, str):
            raise CheckpointError(f"The saved run is damaged: its name is {ledger.run!r}.")
        if kept is not None and not (isinstance(kept, dict) and set(kept) == {"id", "budget"}):
            raise CheckpointError(f"The saved run is damaged: kept_in {kept!r}.")
        run = cls(plan, randomness=randomness, ledger=ledger, steps_in_pass=steps_in_pass)
        run._kept = kept
        return run

    def refuse_resuming(self, other: RunState) -> None:
        """Raise unless this run may go on from a saved one: its spending is known here, its budget is kept.

        Raises:
            CheckpointError: the ledger that the saved run was kept in is missing, another one, cut, or under a weaker
                budget.
        """
        account, kept = self.ledger.within, other._kept
        if kept is None:
            return
        budget = _saved_budget(kept)
        if kept["id"] is not None and (account is None or account.id != kept["id"]):
            there = "no ledger was given" if account is None else f"{account.name} is another one"
            raise CheckpointError(
                f"The saved run recorded its releases in a ledger file (id {kept['id']}), and {there}: what that data "
                "has spent would be forgotten. Give make_private the run's own: ledger=LedgerFile(path)."
            )
        if budget is not None and (account is None or account.budget is None):
            raise CheckpointError(
                f"The saved run was under a budget of {budget}, and this one is under none. Give make_private a ledger "
                "with that budget."
            )
        here = None if account is None else account.budget
        if budget is not None and here is not None and not here.is_at_least_as_strict_as(budget):
            raise CheckpointError(
                f"The saved run was under a budget of {budget}; {here} is weaker. Resume under the saved one."
            )
        if kept["id"] is not None and account is not None and (lost := _lost(other.ledger, account)):
            raise CheckpointError(
                f"The saved run has made {lost} more releases than {account.name} knows of: the file was cut, or is an "
                "older copy. Restore it from a copy that has all releases."
            )

    def become(self, other: RunState) -> None:
        """Take over another state of the same plan.

        If this run has released more than the other one, those releases have happened all the same: its
        ledger stays, and steps go on after it. So it is with steps of a secure run that the dataset's ledger has and
        the saved state has not: they stay spent, and steps go on after them. Under an insecure seed they
        are the next steps, to the last bit, and are taken again.

        Raises:
            CheckpointError: as `refuse_resuming`; nothing was changed.
        """
        self.refuse_resuming(other)
        account, theirs = self.ledger.within, other.ledger
        if account is not None:
            if other._kept is None or other._kept["id"] is None:  # made elsewhere: from now on it counts here
                account.adopt(tuple(replace(segment, run=theirs.run) for segment in theirs.segments))
            if other.secure and theirs.run != self.ledger.run:
                theirs.catch_up(account.of_run(theirs.run))
        if theirs.releases >= self.ledger.releases:
            theirs.within = account
            self.ledger = theirs
        self.ledger.repeatable = not other.secure
        self.steps_in_pass = other.steps_in_pass
        self._randomness = other._randomness
        self.noise = other.noise
        self.sampling = other.sampling


def new_run_id(name: str | None = None) -> str:
    """An identity that no other run has, after the name that a user gave it.

    Raises:
        ParameterError: the name is not a text.
    """
    if name is not None and not isinstance(name, str):
        raise ParameterError(f"run_name must be a text, got {name!r}.")
    drawn = secrets.token_hex(8)
    return f"{name} {drawn}" if name else drawn


def step_event(plan: PrivacyPlan) -> Event:
    """What one step of a plan releases."""
    event = plan.event(1)
    return event.event if isinstance(event, Repeated) else event


def _saved_budget(kept: dict[str, Any]) -> Budget | None:
    try:
        return None if kept["budget"] is None else Budget.from_dict(kept["budget"])
    except (ParameterError, TypeError) as error:
        raise CheckpointError(f"The saved run is damaged: {error}") from error


def _lost(ledger: Ledger, account: Account) -> int:
    """How many of a run's releases its dataset's ledger does not have."""
    known = amounts(account.of_run(ledger.run))
    return sum(max(0, count - known.get(kind, 0)) for kind, count in amounts(ledger.segments).items())
