"""What was released: frozen values that say which mechanism ran, never how it is accounted.

`Event` is the base of all of them; `Repeated` and `Composed` put them together. Kinds of noise, ways of sampling and
the rest are the other files of this package.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from accountants import arguments
from accountants.errors import ParameterError

SCHEMA_VERSION = 1
DEEPEST = 100  # events within events

_KINDS: dict[str, type[Event]] = {}
_NAMES: dict[type[Event], str] = {}


class Event:
    """Base of all events. `event * n` and `n * event` repeat it, `a + b` composes.

    Subclasses are frozen dataclasses that name their `kind` in JSON: `class Gaussian(Event, kind="gaussian")`. Their
    fields are numbers, strings, events, or tuples of those.

    Guarantee:
        None by itself: an event describes what ran, and an accountant bounds what that spends.
    """

    def __init_subclass__(cls, *, kind: str) -> None:
        assert kind not in _KINDS, f"two events call themselves {kind!r}"
        _KINDS[kind] = cls
        _NAMES[cls] = kind

    def __mul__(self, count: int) -> Event:
        return Repeated(self, count)

    __rmul__ = __mul__

    def __add__(self, other: Event) -> Event:
        if not isinstance(other, Event):
            return NotImplemented
        return Composed((self, other))

    @functools.cached_property
    def depth(self) -> int:
        """How many events are within each other at most: 1 for one that holds no other."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        members = (value if isinstance(value, tuple) else (value,) for value in values)
        return 1 + max((part.depth for member in members for part in member if isinstance(part, Event)), default=0)

    def to_json(self) -> str:
        """The event as JSON text, floats exact to the last bit, infinity as "inf", with a schema version."""
        document = {"schema_version": SCHEMA_VERSION, "event": _to_dict(self)}
        return json.dumps(document, sort_keys=True, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Event:
        """The event that `to_json` wrote.

        Raises:
            ParameterError: not JSON, another schema version, an unknown event, a missing or unknown field, more than
                100 events within each other, or a value that the event's own constructor refuses.
        """
        try:
            document = json.loads(text, parse_constant=_refuse_constant)
        except RecursionError:
            raise _too_deep("event document") from None
        except (TypeError, ValueError) as error:
            raise ParameterError(f"event is not JSON: {error}. Give text that Event.to_json wrote.") from None
        _fields(document, {"schema_version", "event"}, "event document")
        version = document["schema_version"]
        if type(version) is not int or version != SCHEMA_VERSION:
            raise ParameterError(
                f"event schema_version must be {SCHEMA_VERSION}, got {arguments.shown(version)}. "
                "Read it with the version of accountants that wrote it."
            )
        return _from_dict(document["event"], 1)


@dataclasses.dataclass(frozen=True)
class Repeated(Event, kind="repeated"):
    """`event`, count times, with fresh randomness each time; a repeated repetition multiplies out.

    Args:
        event: what is repeated.
        count: an int >= 0; 0 releases nothing.

    Guarantee:
        An accountant bounds all repetitions together, each of which may depend on the answers before it.

    Raises:
        ParameterError: not an event, or a count that is not an int >= 0.
    """

    event: Event
    count: int

    def __post_init__(self) -> None:
        require_event("Repeated", self.event)
        count = arguments.whole("count", self.count, remedy="Give how many times the event ran, for example 1000.")
        inner = self.event
        if isinstance(inner, Repeated):
            remedy = "Check the counts of the repeated repetition."
            count, inner = arguments.whole("count", count * inner.count, remedy=remedy), inner.event
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "event", inner)


@dataclasses.dataclass(frozen=True)
class Composed(Event, kind="composed"):
    """Events one after another, each allowed to depend on the outputs (not the parameters) of those before.

    Nested compositions are flattened, and neighbours that are equal are merged into one `Repeated`, so a long
    training run of one kind of step is a single entry. An empty composition releases nothing: epsilon is 0.

    Args:
        events: any iterable of events, in order.

    Raises:
        ParameterError: not a list of events.

    Example:
        >>> from accountants.events import Gaussian, Laplace
        >>> Composed([Gaussian(1.0), Gaussian(1.0), Laplace(2.0)]).events
        (Repeated(event=Gaussian(noise_multiplier=1.0), count=2), Laplace(scale=2.0))
    """

    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        given = self.events
        if isinstance(given, (Event, str, Mapping)) or not isinstance(given, Iterable):
            raise ParameterError(
                f"events must be a list of events, got {arguments.shown(given)}. Write Composed([a, b])."
            )
        runs: list[tuple[Event, int]] = []
        for event, count in _runs(given):
            if runs and runs[-1][0] == event:
                runs[-1] = (event, runs[-1][1] + count)
            elif count:
                runs.append((event, count))
        merged = tuple(event if count == 1 else Repeated(event, count) for event, count in runs)
        object.__setattr__(self, "events", merged)


def _runs(events: Iterable[object]) -> Iterator[tuple[Event, int]]:
    for event in events:
        require_event("Composed", event)
        if isinstance(event, Repeated) and event.count == 1:
            event = event.event
        if isinstance(event, Composed):
            yield from _runs(event.events)
        elif isinstance(event, Repeated):
            yield event.event, event.count
        else:
            assert isinstance(event, Event)
            yield event, 1


def require_event(owner: str, value: object) -> None:
    """Refuse, in the name of the class `owner`, what is not an event."""
    if not isinstance(value, Event):
        shown = arguments.shown(value)
        raise ParameterError(f"{owner} takes an event, got {shown}. Give one such as Gaussian(1.0).")
    if value.depth >= DEEPEST:
        raise _too_deep(owner)


def _too_deep(owner: str) -> ParameterError:
    return ParameterError(
        f"{owner} holds more than {DEEPEST} events within each other. Multiply nested sample rates, counts and group "
        "sizes out."
    )


def _refuse_constant(text: str) -> None:
    raise ValueError(f"it holds {text}")


def _to_dict(event: Event) -> dict[str, Any]:
    document: dict[str, Any] = {"kind": _NAMES[type(event)]}
    for field in dataclasses.fields(event):  # type: ignore[arg-type]
        value = getattr(event, field.name)
        document[field.name] = _to_plain(value)
    return document


def _to_plain(value: object) -> object:
    if isinstance(value, Event):
        return _to_dict(value)
    if value == math.inf:
        return _INFINITY
    return [_to_plain(member) for member in value] if isinstance(value, tuple) else value


_INFINITY = "inf"  # JSON has no such number


def _from_dict(document: object, depth: int) -> Event:
    name = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(name, str) or name not in _KINDS:
        known = ", ".join(_KINDS)
        shown = arguments.shown(document)
        raise ParameterError(f"event kind must be one of {known}; got {shown}. Check the file's origin.")
    kind = _KINDS[name]
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    _fields(document, names | {"kind"}, name)
    return kind(**{name: _from_plain(document[name], depth + 1) for name in names})


def _from_plain(value: object, depth: int) -> object:
    if isinstance(value, (dict, list)) and depth > 2 * DEEPEST:  # a list of events is one level more
        raise _too_deep("event document")
    if isinstance(value, dict):
        return _from_dict(value, depth)
    if value == _INFINITY:
        return math.inf
    return tuple(_from_plain(member, depth + 1) for member in value) if isinstance(value, list) else value


def _fields(document: object, expected: set[str], where: str) -> None:
    if not isinstance(document, dict):
        raise ParameterError(
            f"{where} must be a JSON object, got {arguments.shown(document)}. Check the file's origin."
        )
    missing, unknown = sorted(expected - set(document)), sorted(set(document) - expected)
    if missing or unknown:
        raise ParameterError(
            f"{where}: missing fields {missing}, unknown fields {unknown}. Check the version that wrote it."
        )
