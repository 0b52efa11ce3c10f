"""The lines of a ledger file: JSON, numbered, each sealed with a digest that covers all lines before it.

    {"n": 0, "kind": "header", "schema": ..., "id": ..., "relation": ..., "budget": ..., "sha256": ...}
    {"n": 1, "kind": "spent", "run": ..., "branch": ..., "label": ..., "first": 0, "count": 8, "event": {...}, ...}
    {"n": 2, "kind": "returned", "run": ..., "branch": ..., "label": ..., "first": 5, "count": 3, "event": {...}, ...}

The digest of a line is SHA-256 of the digest before it, a line feed, and the line without its digest, byte for byte. A
line that is changed, moved or taken out of the middle breaks the chain there. The chain has no key: it finds accidents
and careless edits, not someone who writes the whole file anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from accountants import Event, NeighboringRelation
from dpdl.budget import Budget
from dpdl.errors import LedgerError, ParameterError
from dpdl.tally import Segment, refuse_nonsense

__all__ = ["BEFORE_THE_FIRST", "Content", "Header", "Link", "Returned", "pieces", "sealed", "unsealed"]

SCHEMA = "dpdl.ledger_file/2"
_MARK = b', "sha256": "'
_HEX = 64
_END = b'"}'
_HOLE = bytes(16)  # what a page that was not written reads as; JSON has no zero bytes, and a flipped bit makes one


@dataclass(frozen=True, kw_only=True)
class Link:
    """Where a chain stands.

    Attributes:
        number: of the next line.
        digest: of the last one.
    """

    number: int
    digest: str


BEFORE_THE_FIRST = Link(number=0, digest="0" * _HEX)


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first line.

    Attributes:
        id: drawn at random, tells one ledger from another.
        relation: what neighbouring datasets differ in.
        budget: what all runs may spend together, for whoever opens the file.
    """

    id: str
    relation: NeighboringRelation
    budget: Budget | None


@dataclass(frozen=True, kw_only=True)
class Returned:
    """Releases that were recorded ahead and have not happened."""

    segment: Segment


Content = Header | Segment | Returned


def sealed(content: Content, link: Link) -> tuple[bytes, Link]:
    """The next line, with its line feed, and where the chain stands after it."""
    body = json.dumps({"n": link.number, **_values(content)}).encode()
    digest = _digest(body, link)
    return body[:-1] + _MARK + digest.encode() + _END + b"\n", Link(number=link.number + 1, digest=digest)


def unsealed(line: bytes, link: Link) -> tuple[Content, Link]:
    """What a line, without its line feed, says.

    Raises:
        LedgerError: it is not the line that `sealed` would have put there.
    """
    at = len(line) - len(_MARK) - _HEX - len(_END)
    if at < 1 or line[at : at + len(_MARK)] != _MARK or line[-len(_END) :] != _END:
        raise LedgerError(f"line {link.number} is not sealed")
    body = line[:at] + b"}"
    digest = _digest(body, link)
    if line[at + len(_MARK) : -len(_END)] != digest.encode():
        raise LedgerError(f"line {link.number} does not follow from the lines before it, or was changed")
    try:
        content = _content(json.loads(body), link.number)
    except (ValueError, KeyError, TypeError) as error:  # of JSON, or a ParameterError
        raise LedgerError(f"line {link.number} cannot be read, perhaps of a newer version ({error})") from error
    return content, Link(number=link.number + 1, digest=digest)


def pieces(data: bytes) -> tuple[list[bytes], bytes]:
    """Whole lines, and what a write that did not end has left: no line feed, or pages that never reached the disk."""
    *lines, rest = data.split(b"\n")
    if not rest and lines and _HOLE in lines[-1]:
        rest = lines.pop() + b"\n"
    return lines, rest


def _digest(body: bytes, link: Link) -> str:
    return hashlib.sha256(link.digest.encode() + b"\n" + body).hexdigest()


def _values(content: Content) -> dict[str, Any]:
    if isinstance(content, Header):
        budget = None if content.budget is None else content.budget.to_dict()
        values = {"kind": "header", "schema": SCHEMA, "id": content.id, "relation": content.relation.value}
        return {**values, "budget": budget}
    kind = "returned" if isinstance(content, Returned) else "spent"
    segment = content.segment if isinstance(content, Returned) else content
    return {
        "kind": kind,
        "run": segment.run,
        "branch": segment.branch,
        "label": segment.label,
        "first": segment.first,
        "count": segment.count,
        "event": json.loads(segment.event.to_json()),
    }


def _content(values: dict[str, Any], number: int) -> Content:
    kind = values.pop("kind")
    if values.pop("n") != number or kind not in ("header", "spent", "returned"):
        raise ParameterError(f"number or kind {kind!r}")
    if (kind == "header") != (number == 0):
        raise ParameterError("a header that is not the first line, or another first line")
    if kind == "header":
        if values["schema"] != SCHEMA or set(values) != {"schema", "id", "relation", "budget"}:
            raise ParameterError(f"schema {values['schema']!r}, expected {SCHEMA!r}")
        budget = None if values["budget"] is None else Budget.from_dict(values["budget"])
        return Header(id=str(values["id"]), relation=NeighboringRelation(values["relation"]), budget=budget)
    if set(values) != {"run", "branch", "label", "first", "count", "event"}:
        raise ParameterError(f"fields {sorted(values)}")
    first, count = values["first"], values["count"]
    if not type(first) is type(count) is int or first < 0 or count < 1:
        raise ParameterError(f"first {first!r} and count {count!r}")
    segment = Segment(**{**values, "event": Event.from_json(json.dumps(values["event"]))})
    refuse_nonsense(segment.event, label=segment.label, run=segment.run, branch=segment.branch)
    return segment if kind == "spent" else Returned(segment=segment)
