"""How far a private run has come: its ledger, its random streams, its place in the pass over the data."""

from __future__ import annotations

from typing import Any

from accountants import NeighboringRelation
from dpdl.errors import CheckpointError
from dpdl.ledger import Ledger
from dpdl.plan import PrivacyPlan
from dpdl.secure_random import RandomStream

__all__ = ["RunState"]


class RunState:
    """All that changes from step to step besides weights and optimizer.

    A step's number (the ledger's count of releases) addresses both its draw and its noise, so there is no
    generator position that could be lost or rewound.

    Args:
        plan: what the run is held to.
        randomness: the root of its streams.
        ledger: releases so far.
        steps_in_pass: steps taken in the current pass over the loader.
    """

    def __init__(
        self, plan: PrivacyPlan, *, randomness: RandomStream, ledger: Ledger | None = None, steps_in_pass: int = 0
    ) -> None:
        self.plan = plan
        self.ledger = ledger or Ledger(relation=NeighboringRelation(plan.relation))
        self.steps_in_pass = steps_in_pass
        self._randomness = randomness
        self.noise = randomness.child("noise")
        self.sampling = randomness.child("sampling")

    @property
    def secure(self) -> bool:
        """Whether noise and sampling come from a key that nobody knows."""
        return self._randomness.secure

    def next_step(self) -> int:
        """Record one more release and return its number, from 0."""
        step = self.ledger.releases
        self.ledger.record(self.plan.event(1))
        self.steps_in_pass += 1
        return step

    def state_dict(self) -> dict[str, Any]:
        """Plain values. A secure stream's key is not among them."""
        return {
            "ledger": self.ledger.to_json(),
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
            steps_in_pass = state["steps_in_pass"]
            randomness = RandomStream.from_state_dict(state["randomness"])
        except KeyError as error:
            raise CheckpointError(f"The saved run has no {error}. Resume from an undamaged checkpoint.") from error
        if type(steps_in_pass) is not int or not 0 <= steps_in_pass <= ledger.releases:
            raise CheckpointError(f"The saved run is damaged: steps_in_pass {steps_in_pass!r}.")
        return cls(plan, randomness=randomness, ledger=ledger, steps_in_pass=steps_in_pass)

    def become(self, other: RunState) -> None:
        """Take over another state of the same plan.

        If this run has released more than the other one, those releases have happened all the same: its
        ledger stays, and steps go on after it.
        """
        if other.ledger.releases > self.ledger.releases:
            self.ledger = other.ledger
        self.steps_in_pass = other.steps_in_pass
        self._randomness = other._randomness
        self.noise = other.noise
        self.sampling = other.sampling
