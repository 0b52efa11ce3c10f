"""What was released: frozen values that say which mechanism ran, never how it is accounted.

    Gaussian, Laplace                  one noisy answer
    PoissonSampled(rate, event)        the same, computed on a random subset of the examples
    Repeated(event, count)             count times, each with fresh randomness
    Composed(events)                   one after another, each with fresh randomness

Every parameter is public: it must not have been chosen by looking at the private data (a schedule fixed in
advance is fine; "stop when epsilon hits 3" is not, that needs a privacy filter).

Example:
    >>> dpsgd = 1000 * PoissonSampled(0.01, Gaussian(1.0))
    >>> dpsgd
    Repeated(event=PoissonSampled(sample_rate=0.01, event=Gaussian(noise_multiplier=1.0)), count=1000)
    >>> Event.from_json(dpsgd.to_json()) == dpsgd
    True
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from accountants import arguments
from accountants.errors import ParameterError

SCHEMA_VERSION = 1


class Event:
    """Base of all events. `event * n` and `n * event` repeat it, `a + b` composes."""

    def __mul__(self, count: int) -> Event:
        return Repeated(self, count)

    __rmul__ = __mul__

    def __add__(self, other: Event) -> Event:
        if not isinstance(other, Event):
            return NotImplemented
        return Composed((self, other))

    def to_json(self) -> str:
        """The event as JSON text, floats exact to the last bit, with a schema version."""
        return json.dumps({"schema_version": SCHEMA_VERSION, "event": _to_dict(self)}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Event:
        """The event that `to_json` wrote.

        Raises:
            ParameterError: not JSON, another schema version, an unknown event, a missing or unknown field, or a
                value that the event's own constructor refuses.
        """
        try:
            document = json.loads(text)
        except (TypeError, ValueError) as error:
            raise ParameterError(f"event is not JSON: {error}. Give text that Event.to_json wrote.") from None
        _fields(document, {"schema_version", "event"}, "event document")
        if document["schema_version"] != SCHEMA_VERSION or isinstance(document["schema_version"], bool):
            raise ParameterError(
                f"event schema_version must be {SCHEMA_VERSION}, got {document['schema_version']!r}. "
                "Read it with the version of accountants that wrote it."
            )
        return _from_dict(document["event"])


@dataclasses.dataclass(frozen=True)
class Gaussian(Event):
    """f(x) + N(0, noise_multiplier^2 I), where f moves by at most 1 in L2 norm.

    The unit is the clip norm: noise_multiplier = noise std / clip norm, for every neighbouring relation.
    Under add/remove and zero-out, the mechanism is dominated by the pair N(0, s^2), N(1, s^2); under replacement
    by N(0, s^2), N(2, s^2).

    Args:
        noise_multiplier: s >= 0, finite; 0 releases f(x) itself, and epsilon is infinite.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", arguments.noise_scale("noise_multiplier", self.noise_multiplier))


@dataclasses.dataclass(frozen=True)
class Laplace(Event):
    """f(x) + Laplace noise of scale `scale` (density exp(-|z| / scale) / (2 scale)), f real with sensitivity 1.

    Dominated by the pair Lap(0, b), Lap(1, b) under add/remove and zero-out, Lap(0, b), Lap(2, b) under
    replacement. One release is (1 / b)-differentially private with delta = 0 under add/remove.

    Args:
        scale: b >= 0, finite, in units of the sensitivity; 0 releases f(x) itself, and epsilon is infinite.
    """

    scale: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", arguments.noise_scale("scale", self.scale))


@dataclasses.dataclass(frozen=True)
class PoissonSampled(Event):
    """`event` run on a random subset that holds each example independently with probability sample_rate.

    Not for shuffled or fixed-size batches: their privacy is worse, and this event's numbers do not cover them.
    With inner pair (A, B), B the data set with the example: dominated by ((1 - q) A + q B, A) for removal and its
    reverse for addition [1, Theorem 11]; the tight epsilon is the larger of the two compositions.

    Args:
        sample_rate: q in [0, 1]; 0 releases nothing about any example, 1 is `event` itself.
        event: what runs on each subset.

    References:
        [1] Zhu, Dong, Wang, Optimal Accounting of Differential Privacy via Characteristic Function, 2022.
            arXiv:2106.08567
    """

    sample_rate: float
    event: Event

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_rate", arguments.sample_rate(self.sample_rate))
        _require_event("PoissonSampled", self.event)


@dataclasses.dataclass(frozen=True)
class Repeated(Event):
    """`event`, count times, with fresh randomness each time; a repeated repetition multiplies out.

    Args:
        event: what is repeated.
        count: an int >= 0; 0 releases nothing.
    """

    event: Event
    count: int

    def __post_init__(self) -> None:
        _require_event("Repeated", self.event)
        count = arguments.whole("count", self.count, remedy="Give how many times the event ran, for example 1000.")
        inner = self.event
        if isinstance(inner, Repeated):
            count, inner = count * inner.count, inner.event
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "event", inner)


@dataclasses.dataclass(frozen=True)
class Composed(Event):
    """Events one after another, each allowed to depend on the outputs (not the parameters) of those before.

    Nested compositions are flattened, and neighbours that are equal are merged into one `Repeated`, so a long
    training run of one kind of step is a single entry. An empty composition releases nothing: epsilon is 0.

    Args:
        events: any iterable of events, in order.

    Example:
        >>> Composed([Gaussian(1.0), Gaussian(1.0), Laplace(2.0)]).events
        (Repeated(event=Gaussian(noise_multiplier=1.0), count=2), Laplace(scale=2.0))
    """

    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        given = self.events
        if isinstance(given, (Event, str, Mapping)) or not isinstance(given, Iterable):
            raise ParameterError(f"events must be a list of events, got {given!r}. Write Composed([a, b]).")
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
        _require_event("Composed", event)
        if isinstance(event, Composed):
            yield from _runs(event.events)
        elif isinstance(event, Repeated):
            yield event.event, event.count
        else:
            assert isinstance(event, Event)
            yield event, 1


def _require_event(owner: str, value: object) -> None:
    if not isinstance(value, Event):
        raise ParameterError(f"{owner} takes an event, got {value!r}. Give one such as Gaussian(1.0).")


_KINDS: dict[str, type[Event]] = {
    "gaussian": Gaussian,
    "laplace": Laplace,
    "poisson_sampled": PoissonSampled,
    "repeated": Repeated,
    "composed": Composed,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def _to_dict(event: Event) -> dict[str, Any]:
    document: dict[str, Any] = {"kind": _NAMES[type(event)]}
    for field in dataclasses.fields(event):  # type: ignore[arg-type]
        value = getattr(event, field.name)
        if isinstance(value, Event):
            value = _to_dict(value)
        elif isinstance(value, tuple):
            value = [_to_dict(member) for member in value]
        document[field.name] = value
    return document


def _from_dict(document: object) -> Event:
    if not isinstance(document, dict) or document.get("kind") not in _KINDS:
        known = ", ".join(_KINDS)
        raise ParameterError(f"event kind must be one of {known}; got {document!r}. Check the file's origin.")
    kind = _KINDS[document["kind"]]
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    _fields(document, names | {"kind"}, document["kind"])
    values: dict[str, Any] = {}
    for name in names:
        value = document[name]
        if name == "event":
            value = _from_dict(value)
        elif name == "events":
            if not isinstance(value, list):
                raise ParameterError(f"events must be a list, got {value!r}. Check the file's origin.")
            value = [_from_dict(member) for member in value]
        values[name] = value
    return kind(**values)


def _fields(document: object, expected: set[str], where: str) -> None:
    if not isinstance(document, dict):
        raise ParameterError(f"{where} must be a JSON object, got {document!r}. Check the file's origin.")
    missing, unknown = sorted(expected - set(document)), sorted(set(document) - expected)
    if missing or unknown:
        raise ParameterError(
            f"{where}: missing fields {missing}, unknown fields {unknown}. Check the version that wrote it."
        )
