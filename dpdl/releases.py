"""What a report lists of a ledger: equal releases of one run, counted together, and the dataset's ledger as a whole.

A report outlives its process and its ledger. With the releases in it, whoever has the report can compute epsilon at
another delta, the curve over the steps, and what an attacker can do, without asking anybody.

Public: kinds, counts, labels and names of runs. They say how often data was used, and nothing of what it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from accountants import Event
from dpdl.errors import ParameterError

__all__ = ["TRAINING_STEP", "DatasetRecord", "Release", "counted"]

TRAINING_STEP = "step"  # the label of a run's own steps
_FIELDS = {"run", "label", "count", "event"}
_RECORD_FIELDS = {"name", "id", "budget", "releases"}
_BUDGET_FIELDS = {"epsilon", "delta", "adaptive"}


@dataclass(frozen=True, kw_only=True)
class Release:
    """Equal releases of one run.

    Attributes:
        event: one of them, with the sampling in front of it.
        count: how many, >= 1.
        label: what for: "step", "mean of the ages", ...
        run: whose, for a run other than the report's own; else "".
    """

    event: Event
    count: int
    label: str
    run: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The release as plain values."""
        return {"run": self.run, "label": self.label, "count": self.count, "event": json.loads(self.event.to_json())}

    @classmethod
    def from_dict(cls, values: object) -> Release:
        """The release that `to_dict` wrote.

        Raises:
            ParameterError: it is damaged.
        """
        if not isinstance(values, dict) or set(values) != _FIELDS:
            raise ParameterError(f"A release has the fields {sorted(_FIELDS)}, got {values!r}.")
        run, label, count = values["run"], values["label"], values["count"]
        if not isinstance(run, str) or not isinstance(label, str) or type(count) is not int or count < 1:
            raise ParameterError(f"Not a release: run {run!r}, label {label!r}, count {count!r}.")
        return cls(event=Event.from_json(json.dumps(values["event"])), count=count, label=label, run=run)


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """What the ledger that a run shares with others holds: the releases of all runs on the data.

    Attributes:
        name: what the ledger is called.
        releases: all of them, each with its run.
        id: what tells the ledger from others for good; None if it does not outlive its process.
        budget: what it holds its releases to, (epsilon, delta); None without one.
        adaptive: whether they may be chosen by looking at earlier ones; the claim is then the budget.
    """

    name: str
    releases: tuple[Release, ...]
    id: str | None = None
    budget: tuple[float, float] | None = None
    adaptive: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values."""
        budget = None
        if self.budget is not None:
            budget = {"epsilon": self.budget[0], "delta": self.budget[1], "adaptive": self.adaptive}
        releases = [release.to_dict() for release in self.releases]
        return {"name": self.name, "id": self.id, "budget": budget, "releases": releases}

    @classmethod
    def from_dict(cls, values: object) -> DatasetRecord:
        """The record that `to_dict` wrote.

        Raises:
            ParameterError: it is damaged.
        """
        if not isinstance(values, dict) or set(values) != _RECORD_FIELDS or not isinstance(values["releases"], list):
            raise ParameterError(f"A dataset's ledger has the fields {sorted(_RECORD_FIELDS)}, got {values!r}.")
        name, known, budget = values["name"], values["id"], values["budget"]
        if not isinstance(name, str) or not (known is None or isinstance(known, str)):
            raise ParameterError(f"Not a dataset's ledger: name {name!r}, id {known!r}.")
        limit, adaptive = None, False
        if budget is not None:
            if not isinstance(budget, dict) or set(budget) != _BUDGET_FIELDS:
                raise ParameterError(f"Not a budget: {budget!r}.")
            epsilon, delta, adaptive = budget["epsilon"], budget["delta"], budget["adaptive"]
            if not (_number(epsilon) and epsilon > 0 and _number(delta) and 0 < delta < 1 and type(adaptive) is bool):
                raise ParameterError(f"Not a budget: {budget!r}.")
            limit = float(epsilon), float(delta)
        releases = tuple(Release.from_dict(release) for release in values["releases"])
        return cls(name=name, releases=releases, id=known, budget=limit, adaptive=adaptive)


def counted(releases: Iterable[Release]) -> dict[Event, int]:
    """How many releases of each kind, in the order of the first."""
    counts: dict[Event, int] = {}
    for release in releases:
        counts[release.event] = counts.get(release.event, 0) + release.count
    return counts


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
