"""How far a private run has come: its ledger, its random streams, its place in the pass over the data."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import replace
from typing import Any, Protocol

from accountants import Event, NeighboringRelation
from accountants.events import Repeated
from dpdl.account import Account
from dpdl.budget import Budget
from dpdl.errors import CheckpointError, ParameterError, PlanExhaustedError
from dpdl.ledger import Ledger
from dpdl.plan import PrivacyPlan
from dpdl.secure_random import RandomStream
from dpdl.tally import Segment

__all__ = ["STEP", "RunPlan", "RunState", "new_run_id", "step_event"]

STEP = "step"  # the label of training steps


class RunPlan(Protocol):
    """What a run is held to: a `PrivacyPlan`, or another plan of equal steps."""

    @property
    def steps(self) -> int:
        """How many there are at most."""

    @property
    def relation(self) -> NeighboringRelation | str:
        """What neighbouring datasets differ in."""

    def event(self, steps: int, /) -> Event:
        """What that many steps release."""


class RunState:
    """All that changes from step to step besides weights and optimizer.

    A step is drawn under a key, at a position: how many steps that key has drawn. The position addresses both the
    step's examples and its noise, so there is no generator position that could be lost or rewound. The key's name is
    the branch of the step's address in the ledger.

    Args:
        plan: what the run is held to.
        randomness: the root of its streams.
        ledger: the run's releases so far; it may lie within the dataset's ledger.
        steps_in_pass: steps taken in the current pass over the loader.
    """

    def __init__(
        self, plan: RunPlan, *, randomness: RandomStream, ledger: Ledger | None = None, steps_in_pass: int = 0
    ) -> None:
        self.plan = plan
        self.ledger = ledger or Ledger(relation=NeighboringRelation(plan.relation), run=new_run_id())
        self.ledger.reserve(STEP)
        self.steps_in_pass = steps_in_pass
        self._event = step_event(plan)
        self._kept: dict[str, Any] | None = None  # of a saved state: which ledger it was kept in
        self._draw_from(randomness)

    def _draw_from(self, randomness: RandomStream) -> None:
        self._randomness = randomness
        self.noise = randomness.child("noise")
        self.sampling = randomness.child("sampling")
        self.branch = randomness.name
        self.position = self.ledger.next_number(self.branch, STEP)

    @property
    def secure(self) -> bool:
        """Whether noise and sampling come from a key that nobody knows."""
        return self._randomness.secure

    @property
    def steps_taken(self) -> int:
        """Training steps so far; other releases are in the ledger, too, and are not among them."""
        return self.ledger.count(STEP)

    @property
    def _number(self) -> int | None:
        """A step's number in the ledger: under a seed the position, at which the same step is drawn again."""
        return None if self.secure else self.position

    def take_key(self, key: bytes) -> None:
        """Go on with this key: the same for all processes of a run, and for no other use."""
        self._draw_from(RandomStream(key))

    def refuse_overspending(self) -> None:
        """Raise unless one more step is within the plan and all budgets, before anything is spent.

        If it is, and other runs share the ledger, none of them can take what this step needs.

        Raises:
            PlanExhaustedError: the plan has no step left.
            BudgetExceededError: the step would overspend.
            LedgerError: the ledger's file was damaged, or another run in it has the same insecure seed.
        """
        if self.steps_taken >= self.plan.steps:
            raise PlanExhaustedError(
                f"The plan's {self.plan.steps} steps are taken. Make a plan with more steps before training."
            )
        left = self.plan.steps - self.steps_taken
        self.ledger.claim(self._event, label=STEP, branch=self.branch, number=self._number, ahead=left)

    def another_step_fits(self) -> bool:
        """Whether all budgets have room for one more step, as of now."""
        return self.ledger.fits(self._event, label=STEP, branch=self.branch, number=self._number)

    def next_step(self) -> int:
        """Record one more step and return its position, from 0.

        Raises:
            BudgetExceededError, LedgerError: as `refuse_overspending`; nothing was recorded.
        """
        left = self.plan.steps - self.steps_taken
        self.ledger.record(self._event, label=STEP, branch=self.branch, number=self._number, ahead=left)
        self.steps_in_pass += 1
        self.position += 1
        return self.position - 1

    def facts(self) -> dict[str, Any]:
        """What is the same in all processes of a data-parallel run, between steps; no release is named."""
        counts = sorted((str(event), count) for event, count in self.ledger.counts.items())
        return {
            "random stream": self.branch,
            "position": self.position,
            "place in the pass": self.steps_in_pass,
            "ledger": hashlib.sha256(json.dumps([self.steps_taken, counts]).encode()).hexdigest()[:16],
        }

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
    def of_saved(cls, private: object, *, plan: PrivacyPlan) -> RunState:
        """The state in what a private optimizer has saved, if it was saved under this plan.

        Raises:
            CheckpointError: it was not, or is damaged.
        """
        if not isinstance(private, dict) or not isinstance(private.get("plan"), str):
            raise CheckpointError(
                "The state is not a private optimizer's: it has no ledger, and loading it would forget what was "
                "spent. Load what PrivateOptimizer.state_dict() returned."
            )
        try:
            saved_plan = PrivacyPlan.from_json(private["plan"])
        except ParameterError as error:
            raise CheckpointError(f"The saved plan cannot be read: {error}") from error
        if saved_plan != plan:
            raise CheckpointError(
                f"The state was saved under another plan. Saved: {saved_plan} Now: {plan} Resume with the saved plan."
            )
        return cls.from_state_dict(private, plan=plan)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], *, plan: RunPlan) -> RunState:
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
        others = [entry.event for entry in ledger.entries if entry.label == STEP and entry.event != run._event]
        if others or ledger.relation is not NeighboringRelation(plan.relation):
            raise CheckpointError(
                f"The saved run is damaged: its ledger has steps of {others or ledger.relation.value}, but its plan "
                f"is of {run._event} under {plan.relation}. What was spent would be misstated."
            )
        run._kept = kept
        return run

    def refuse_resuming(self, other: RunState) -> None:
        """Raise unless this run may go on from a saved one: its spending is known here, its budget is kept.

        Raises:
            CheckpointError: the ledger that the saved run was kept in is missing, another one, cut, or under a weaker
                budget.
        """
        account, kept = self.ledger.within, other._kept
        mine, theirs = self.ledger.budget, other.ledger.budget
        if mine is not None and theirs is not None and not mine.is_at_least_as_strict_as(theirs):
            raise CheckpointError(
                f"The saved run was held to a budget of its own, {theirs}; {mine} is weaker. Resume under the saved "
                "one: give Watchdog(budget=...) that, or no budget."
            )
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

    def elsewhere(self, saved: RunState) -> tuple[Segment, ...]:
        """What the dataset's ledger has of a saved run. What this process has reserved and not used is given back."""
        account = self.ledger.within
        if account is None:
            return ()
        account.give_back(self.ledger.run)
        return account.of_run(saved.ledger.run)

    def become(self, other: RunState, *, elsewhere: tuple[Segment, ...]) -> None:
        """Take over a saved state of the same plan. Nothing that was released is forgotten: all that this state, the
        saved one and the dataset's ledger have of either is counted from now on, each address once.

        Except that, under an insecure seed, steps that the dataset's ledger has and the saved state has not are the
        next steps, to the last bit, and are taken again. If this very process has taken such steps, or others, they
        stay counted, and the run goes on with another key, made from the two states: were it to take other steps at
        their addresses, they would be two releases with the same noise.

        Args:
            other: the saved state.
            elsewhere: what the dataset's ledger has of it, as `elsewhere` gave it.

        Raises:
            CheckpointError: as `refuse_resuming`; nothing was changed.
        """
        self.refuse_resuming(other)
        theirs = other.ledger
        account, budget, mine = self.ledger.within, self.ledger.budget, self._releases_as_seen_from(theirs.run)
        again = {other.branch}
        if not other.secure and theirs.lacks(mine):
            other._draw_from(other._randomness.child(f"branch {_digest(self, other)}"))
        theirs.adopt(mine)
        if not other.secure:
            again.add(other.branch)
            elsewhere = tuple(each for each in elsewhere if each.label != STEP or each.branch not in again)
        theirs.adopt(tuple(replace(segment, run="") for segment in elsewhere))
        if account is not None:
            theirs.within = account
            theirs.adopt(theirs.segments)  # into the account
        if budget is not None:
            theirs.hold_to(budget)
        self.ledger = theirs
        self.steps_in_pass = other.steps_in_pass
        self._draw_from(other._randomness)

    def _releases_as_seen_from(self, run: str) -> tuple[Segment, ...]:
        """All of this state's releases, those of its own run by its name unless that is `run`."""
        here = self.ledger.run
        return tuple(
            replace(segment, run="" if (segment.run or here) == run else segment.run or here)
            for segment in self.ledger.segments
        )


def new_run_id(name: str | None = None) -> str:
    """An identity that no other run has, after the name that a user gave it.

    Raises:
        ParameterError: the name is not a text.
    """
    if name is not None and not isinstance(name, str):
        raise ParameterError(f"run_name must be a text, got {name!r}.")
    drawn = secrets.token_hex(8)
    return f"{name} {drawn}" if name else drawn


def step_event(plan: RunPlan) -> Event:
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
    known = Ledger(relation=ledger.relation)
    named = tuple(replace(segment, run=segment.run or ledger.run) for segment in ledger.segments)
    for run in dict.fromkeys(segment.run for segment in named):
        known.adopt(account.of_run(run))
    return known.lacks(named)


def _digest(*states: RunState) -> str:
    told = json.dumps([[state.branch, state.position, state.ledger.to_json()] for state in states])
    return hashlib.sha256(told.encode()).hexdigest()
