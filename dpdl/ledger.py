"""The ledger: which releases have happened, and what they add up to."""

from __future__ import annotations

import json
from dataclasses import dataclass

from accountants import Composed, Event, Interval, NeighboringRelation, PRVAccountant
from dpdl.errors import CheckpointError

__all__ = ["Entry", "Ledger"]

_SCHEMA = "dpdl.ledger/1"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Equal releases, one after another.

    Attributes:
        event: one release, with the sampling in front of it.
        count: how many.
    """

    event: Event
    count: int


class Ledger:
    """An append-only record of the releases made from one dataset.

    It holds what happened, not what was planned. A release is recorded before it leaves the private
    side, so that whatever goes wrong afterwards, nothing released is unaccounted for.

    Args:
        relation: what neighbouring datasets differ in.
    """

    def __init__(self, *, relation: NeighboringRelation) -> None:
        self.relation = relation
        self._entries: list[Entry] = []

    def record(self, event: Event) -> None:
        """Append one release."""
        if self._entries and self._entries[-1].event == event:
            self._entries[-1] = Entry(event=event, count=self._entries[-1].count + 1)
        else:
            self._entries.append(Entry(event=event, count=1))

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All releases, in order, equal neighbours counted together."""
        return tuple(self._entries)

    @property
    def releases(self) -> int:
        """How many releases there were."""
        return sum(entry.count for entry in self._entries)

    @property
    def event(self) -> Event:
        """The composition of all releases."""
        return Composed(tuple(entry.event * entry.count for entry in self._entries))

    def interval(self, delta: float) -> Interval:
        """A lower and an upper bound on the epsilon spent so far at `delta`."""
        return PRVAccountant(relation=self.relation).compose(self.event).interval(delta)

    def epsilon(self, delta: float) -> float:
        """An upper bound on the epsilon spent so far at `delta`; 0 before the first release."""
        return self.interval(delta).upper

    def to_json(self) -> str:
        """The ledger as JSON, with its schema."""
        return json.dumps(
            {
                "schema": _SCHEMA,
                "relation": self.relation.value,
                "entries": [{"event": json.loads(e.event.to_json()), "count": e.count} for e in self._entries],
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
            ledger = cls(relation=NeighboringRelation(values["relation"]))
            for entry in values["entries"]:
                count = entry["count"]
                if type(count) is not int or count < 1:
                    raise CheckpointError(f"Not a ledger: count {count!r} of an entry.")
                ledger._entries.append(Entry(event=Event.from_json(json.dumps(entry["event"])), count=count))
        except (ValueError, KeyError, TypeError) as error:  # JSON errors and ParameterError are ValueErrors
            raise CheckpointError(f"Not a ledger: {error!r}. Resume from an undamaged checkpoint.") from error
        return ledger
