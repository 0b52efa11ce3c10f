"""What a ledger adds up: releases in order, by kind, and by address.

A release's address is its run, its label and its number among the run's releases of that label. Under an insecure seed
the same address is the same release again, to the last bit, and costs nothing the second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from accountants import Event

__all__ = ["Entry", "Segment", "Tally", "amounts"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Equal releases, one after another.

    Attributes:
        event: one release, with the sampling in front of it.
        count: how many.
        label: what for: "step", "clip", "mean of column 3", ...
        run: which run made them; "" where there is only one.
    """

    event: Event
    count: int
    label: str = "step"
    run: str = ""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Releases of one run and label with consecutive numbers.

    Attributes:
        run, label: whose, and what for.
        event: one release.
        first: the first one's number.
        count: how many.
    """

    run: str
    label: str
    event: Event
    first: int
    count: int

    @property
    def end(self) -> int:
        """The number after the last one."""
        return self.first + self.count


class Tally:
    """Releases so far."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._of: dict[tuple[str, str], list[Segment]] = {}
        self._next: dict[tuple[str, str], int] = {}
        self._counts: dict[Event, int] = {}
        self._labels: dict[str, int] = {}

    @property
    def counts(self) -> Mapping[Event, int]:
        """How many releases of each kind."""
        return MappingProxyType(self._counts)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All releases, in order."""
        return tuple(self._segments)

    @property
    def releases(self) -> int:
        """How many releases of all kinds."""
        return sum(self._counts.values())

    def labelled(self, label: str) -> int:
        """How many releases under a label."""
        return self._labels.get(label, 0)

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs that have released something, in the order of their first release."""
        return tuple(dict.fromkeys(segment.run for segment in self._segments))

    def in_order(self) -> tuple[Entry, ...]:
        """All releases in order, equal neighbours counted together."""
        entries: list[Entry] = []
        for segment in self._segments:
            entry = _entry(segment)
            if entries and replace(entries[-1], count=entry.count) == entry:
                entry = replace(entry, count=entries.pop().count + entry.count)
            entries.append(entry)
        return tuple(entries)

    def by_run(self) -> tuple[Entry, ...]:
        """All releases, those of the same run, label and kind counted together."""
        totals: dict[Entry, int] = {}
        for segment in self._segments:
            kind = replace(_entry(segment), count=1)
            totals[kind] = totals.get(kind, 0) + segment.count
        return tuple(replace(kind, count=count) for kind, count in totals.items())

    def of_run(self, run: str) -> tuple[Segment, ...]:
        """The releases of one run, in order."""
        return tuple(segment for segment in self._segments if segment.run == run)

    def next_number(self, run: str, label: str) -> int:
        """One more than the largest number that this run and label ever had."""
        return self._next.get((run, label), 0)

    def event_at(self, run: str, label: str, number: int) -> Event | None:
        """What was released at an address; None if nothing was."""
        for segment in reversed(self._of.get((run, label), [])):
            if segment.first <= number < segment.end:
                return segment.event
        return None

    def add(self, new: Segment) -> None:
        """Count further releases, at addresses that nothing has."""
        self._counts[new.event] = self._counts.get(new.event, 0) + new.count
        self._labels[new.label] = self._labels.get(new.label, 0) + new.count
        key = (new.run, new.label)
        self._next[key] = max(self._next.get(key, 0), new.end)
        _extend(self._segments, new)
        _extend(self._of.setdefault(key, []), new)

    def holds(self, segment: Segment) -> bool:
        """Whether all of these releases are counted."""
        return any(
            other.event == segment.event and other.first <= segment.first and segment.end <= other.end
            for other in self._of.get((segment.run, segment.label), [])
        )

    def missing(self, segment: Segment) -> tuple[Segment, ...]:
        """The part of these releases that is not counted, in pieces."""
        left = [segment]
        for other in self._of.get((segment.run, segment.label), []):
            left = list(_without(left, other))
        return tuple(left)

    def overlaps(self, segment: Segment) -> bool:
        """Whether something is counted at one of these addresses."""
        return any(
            other.first < segment.end and segment.first < other.end
            for other in self._of.get((segment.run, segment.label), [])
        )

    def remove(self, gone: Segment) -> None:
        """Take back releases that have not happened, and will not: their numbers are never given again."""
        self._counts[gone.event] -= gone.count
        self._labels[gone.label] -= gone.count
        self._segments = list(_without(self._segments, gone))
        self._of[gone.run, gone.label] = list(_without(self._of[gone.run, gone.label], gone))


def amounts(segments: Iterable[Segment]) -> dict[tuple[str, Event], int]:
    """How many releases of each label and kind."""
    found: dict[tuple[str, Event], int] = {}
    for segment in segments:
        key = (segment.label, segment.event)
        found[key] = found.get(key, 0) + segment.count
    return found


def _entry(segment: Segment) -> Entry:
    return Entry(event=segment.event, count=segment.count, label=segment.label, run=segment.run)


def _extend(segments: list[Segment], new: Segment) -> None:
    """Append, as one with the last if it goes on from there: a run is then one segment, however long it is."""
    last = segments[-1] if segments else None
    if (
        last is not None
        and last.end == new.first
        and (last.run, last.label, last.event) == (new.run, new.label, new.event)
    ):
        count = last.count + new.count
        new = Segment(run=last.run, label=last.label, event=last.event, first=last.first, count=count)
        segments.pop()
    segments.append(new)


def _without(segments: Iterable[Segment], gone: Segment) -> Iterable[Segment]:
    """The segments less those numbers; a segment may be cut in two."""
    for segment in segments:
        ours = (segment.run, segment.label) == (gone.run, gone.label)
        if not ours or gone.end <= segment.first or segment.end <= gone.first:
            yield segment
            continue
        for first, end in ((segment.first, gone.first), (gone.end, segment.end)):
            if first < end:
                yield replace(segment, first=first, count=end - first)
