"""What a ledger adds up: releases in order, by kind, and by address.

A release's address is its run, its branch, its label, and its number among the releases of these three. A branch is
what one random key has drawn: two processes that go on from one checkpoint with fresh keys are two branches of a run,
and what they call their fifth step are two releases. Equal addresses are one release, and count once: that is how a
step that is repeated under an insecure seed, to the last bit, is known, and a release that is read in two places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from accountants import Event
from dpdl.errors import ParameterError

__all__ = ["Entry", "Segment", "Tally", "refuse_nonsense"]

_Key = tuple[str, str, str]  # run, branch, label


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
    """Releases of one run, branch and label with consecutive numbers.

    Attributes:
        run, label: whose, and what for.
        event: one release.
        first: the first one's number.
        count: how many.
        branch: which key drew them; "" where nobody else could give the same numbers.
    """

    run: str
    label: str
    event: Event
    first: int
    count: int
    branch: str = ""

    @property
    def key(self) -> _Key:
        """Within which numbers tell releases apart."""
        return self.run, self.branch, self.label

    @property
    def end(self) -> int:
        """The number after the last one."""
        return self.first + self.count


class Tally:
    """Releases so far."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._of: dict[_Key, list[Segment]] = {}
        self._next: dict[_Key, int] = {}
        self._runs_of: dict[str, set[str]] = {}  # by branch
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

    def next_number(self, run: str, branch: str, label: str) -> int:
        """One more than the largest number that this run, branch and label ever had."""
        return self._next.get((run, branch, label), 0)

    def event_at(self, run: str, branch: str, label: str, number: int) -> Event | None:
        """What was released at an address; None if nothing was."""
        for segment in reversed(self._of.get((run, branch, label), [])):
            if segment.first <= number < segment.end:
                return segment.event
        return None

    def other_run_of(self, run: str, branch: str) -> str | None:
        """Another run that has released something with this branch's key; None if there is none."""
        others = self._runs_of.get(branch, set()) - {run} if branch else set()
        return min(others) if others else None

    def add(self, new: Segment) -> None:
        """Count further releases, at addresses that nothing has."""
        self._counts[new.event] = self._counts.get(new.event, 0) + new.count
        self._labels[new.label] = self._labels.get(new.label, 0) + new.count
        self._next[new.key] = max(self._next.get(new.key, 0), new.end)
        self._runs_of.setdefault(new.branch, set()).add(new.run)
        _extend(self._segments, new)
        _extend(self._of.setdefault(new.key, []), new)

    def holds(self, segment: Segment) -> bool:
        """Whether all of these releases are counted."""
        return any(
            other.event == segment.event and other.first <= segment.first and segment.end <= other.end
            for other in self._of.get(segment.key, [])
        )

    def missing(self, segment: Segment) -> tuple[Segment, ...]:
        """The part of these releases that is not counted, in pieces that can be added.

        Something else at the same address does not stand for it; what it takes the place of is given a branch aside.
        """
        left = [segment]
        for other in self._of.get(segment.key, []):
            if other.event == segment.event:
                left = list(_without(left, other))
        pieces: list[Segment] = []
        for piece in left:
            if self.overlaps(piece):
                pieces.extend(self.missing(replace(piece, branch=f"{piece.branch} {piece.event}")))
            else:
                pieces.append(piece)
        return tuple(pieces)

    def overlaps(self, segment: Segment) -> bool:
        """Whether something is counted at one of these addresses."""
        return any(other.first < segment.end and segment.first < other.end for other in self._of.get(segment.key, []))

    def remove(self, gone: Segment) -> None:
        """Take back releases that have not happened, and will not: their numbers are never given again."""
        self._counts[gone.event] -= gone.count
        self._labels[gone.label] -= gone.count
        self._segments = list(_without(self._segments, gone))
        self._of[gone.key] = list(_without(self._of[gone.key], gone))


def refuse_nonsense(
    event: object, *, label: object, run: object, branch: object = "", number: object = None, ahead: object = 1
) -> None:
    """Raise unless these are an event and its address, before anything is written down.

    Raises:
        ParameterError: they are not.
    """
    if not isinstance(event, Event):
        raise ParameterError(f"A ledger records events (accountants.Gaussian(...), ...), got {event!r}.")
    if not isinstance(label, str) or not label or not isinstance(run, str) or not isinstance(branch, str):
        raise ParameterError(f"label and run of a release are texts, got {label!r} and {run!r}.")
    if number is not None and (type(number) is not int or number < 0):
        raise ParameterError(f"number must be an int >= 0, or None for the next one, got {number!r}.")
    if type(ahead) is not int or ahead < 1:
        raise ParameterError(f"ahead must be an int >= 1, got {ahead!r}.")


def _entry(segment: Segment) -> Entry:
    return Entry(event=segment.event, count=segment.count, label=segment.label, run=segment.run)


def _extend(segments: list[Segment], new: Segment) -> None:
    """Append, as one with the last if it goes on from there: a run is then one segment, however long it is."""
    last = segments[-1] if segments else None
    if last is not None and last.end == new.first and (last.key, last.event) == (new.key, new.event):
        new = replace(last, count=last.count + new.count)
        segments.pop()
    segments.append(new)


def _without(segments: Iterable[Segment], gone: Segment) -> Iterable[Segment]:
    """The segments less those numbers; a segment may be cut in two."""
    for segment in segments:
        if segment.key != gone.key or gone.end <= segment.first or segment.end <= gone.first:
            yield segment
            continue
        for first, end in ((segment.first, gone.first), (gone.end, segment.end)):
            if first < end:
                yield replace(segment, first=first, count=end - first)
