"""What a federation promises, adversary by adversary, put together from what its clients and its server claim.

    print(federated_report(server=server, clients=clients, delta=1e-5))

There are four promises, and a federation may keep any of them at once:

| scheme | unit | against |
| --- | --- | --- |
| DP-SGD at each client (`DPClient`) | a record | everybody: the noise is added before anything leaves |
| noise at the server (`ClientLevelPlan`) | a client | those who get the model; not the server |
| noise on each update (`LocalUpdateDP`) | a client, and so each of its records | everybody |
| the first two together | a record, and a client | each as it says |

**Records.** If each record is with one client, adding or removing one changes one client's data, and the claim is the
largest of the clients'. If one person has records with several clients, what is released of that person is the
composition of all that these clients have released; with `shared_persons=True` that is computed, from the events in the
ledgers. Epsilons are never added, and never averaged: a mean of epsilons bounds nothing.

**What is not promised** is said: a client that protects nothing has a line of its own, whatever the others do.

Public: all that is read here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from accountants import arguments
from dpdl.claims import AdversaryReport, Claim
from dpdl.errors import ParameterError
from dpdl.federated.client_report import NOT_COVERED
from dpdl.federated.composition import composed_over, protects_all_of_a_client, server_claim_for_records
from dpdl.federated.inventory import UNPROTECTED, Inventory
from dpdl.federated.messages import Client
from dpdl.federated.server import FederatedServer
from dpdl.federated.server_claims import MODEL_CONSUMERS, OTHER_CLIENTS, SERVER, UNIT

__all__ = ["ADVERSARIES", "federated_report"]

ADVERSARIES = (SERVER, OTHER_CLIENTS, MODEL_CONSUMERS)

_RECORD = "record"
_SECRET = (
    "this report is of the clients that were asked: publish it without their names and number, since the claims of the "
    "server's noise rest on nobody knowing who took part"
)
_NAMED = 5  # clients that are named in a line; of more, how many


@runtime_checkable
class Reporting(Protocol):
    """A client that says what it promises."""

    def report(self, delta: float) -> AdversaryReport:
        """Its claims at `delta`."""


@dataclass(frozen=True, kw_only=True)
class _Member:
    """One client, and what it claims.

    Attributes:
        name: as its repr shows it: names are not ours.
        report: None if it gives none.
        exposed: what leaves without a mechanism: names as their repr shows them, and kinds.
    """

    name: str
    client: Client
    report: AdversaryReport | None
    exposed: tuple[tuple[str, str], ...]

    def claim(self, adversary: str, unit: str) -> Claim:
        """Its claim; one without a guarantee where it makes none."""
        if self.report is None:
            return Claim(against=adversary, unit=unit, because="it gives no report")
        mine = [claim for claim in self.report.claims if (claim.against, claim.unit) == (adversary, unit)]
        if not mine:
            return Claim(against=adversary, unit=unit, because=f"it promises nothing about a {unit}")
        worst = [claim for claim in mine if not claim.guaranteed]
        if worst:
            return worst[0]
        for name, kind in self.exposed:
            if kind in _SEEN_BY[adversary]:
                return Claim(against=adversary, unit=unit, because=f"it sends {name} ({kind}) without protection")
        return max(mine, key=lambda claim: claim.epsilon or 0.0)


# Who sees what a reply carries besides: what is averaged is in the global model.
_SEEN_BY = {
    SERVER: ("parameter", "buffer", "metric"),
    OTHER_CLIENTS: ("parameter", "buffer"),
    MODEL_CONSUMERS: ("parameter", "buffer"),
}


def federated_report(
    *,
    server: FederatedServer | None,
    clients: Iterable[Client],
    delta: float,
    shared_persons: bool = False,
    each_client: bool = False,
    inventories: Mapping[str, Inventory | Iterable[Inventory]] | None = None,
) -> AdversaryReport:
    """All claims of a federation so far, against the server, other clients, and those who get the model.

    Args:
        server: None if its part is not known here.
        clients: those that took part; what each promises is in its `report(delta)`. Of a client that has none, nothing
            is claimed.
        delta: in (0, 1), of every claim.
        shared_persons: whether a person may have records with several of these clients.
        each_client: whether each client has a line of its own besides.
        inventories: by client, what its replies carried (`FitReply.releases`). Whatever is UNPROTECTED in them is
            listed as not covered, and ends the claims against those who see it.

    Raises:
        ParameterError: delta is out of range, two clients have one name, or an inventory is of none of them.
    """
    delta = arguments.delta(delta)
    if server is not None and not isinstance(server, FederatedServer):
        raise ParameterError(f"server must be a FederatedServer, or None, got {type(server).__name__}.")
    if isinstance(clients, str) or not isinstance(clients, Iterable):
        raise ParameterError(f"clients must be a list of clients, got {clients!r}.")
    members = _members(clients, delta, dict(inventories or {}))
    of_server = {} if server is None else {claim.against: claim for claim in server.claims(delta)}
    claims: list[Claim] = []
    for adversary in ADVERSARIES:
        claims += _of_records(adversary, members, server, of_server.get(adversary), delta, shared=shared_persons)
        claims += _of_clients(adversary, members, of_server.get(adversary))
        claims += _of_other_units(adversary, members)
        if each_client:
            claims += _of_each(adversary, members)
    return AdversaryReport(
        title=_title(server, members),
        adversaries=ADVERSARIES,
        claims=tuple(claims),
        not_covered=_open_points(members),
        notes=(
            *((_SECRET,) if members and _participation_is_secret(server) else ()),
            *_together({m.name: () if m.report is None else m.report.notes for m in members}),
        ),
    )


def _members(
    clients: Iterable[Client], delta: float, inventories: dict[str, Inventory | Iterable[Inventory]]
) -> list[_Member]:
    members: list[_Member] = []
    seen: set[str] = set()
    for client in clients:
        if not isinstance(getattr(client, "name", None), str):
            raise ParameterError(f"clients has {client!r}, which has no name: it is no client.")
        if client.name in seen:
            raise ParameterError(
                f"Two clients have the name {client.name!r}: what one of them has spent would stand for both. Give "
                "each client once, under a name of its own."
            )
        seen.add(client.name)
        members.append(
            _Member(
                name=repr(client.name),
                client=client,
                report=client.report(delta) if isinstance(client, Reporting) else None,
                exposed=_exposed(client, inventories.pop(client.name, ())),
            )
        )
    if inventories:
        raise ParameterError(f"There are inventories of {sorted(inventories)}, who are none of the clients.")
    return members


def _exposed(client: Client, inventories: Inventory | Iterable[Inventory]) -> tuple[tuple[str, str], ...]:
    """What leaves unprotected, of inventories and of what the client says it sends: name and kind.

    Two things may have one name: a parameter "weight", and a reply's weight.
    """
    listed = _listed_inventories(client, inventories)
    found = [(repr(release.name), release.kind) for inventory in listed for release in inventory.unprotected]
    known = {name for name, kind in found if kind in ("metric", "count")}
    said = [repr(name) for name in getattr(client, "unprotected", ())]
    return tuple(dict.fromkeys([*found, *((name, "metric") for name in said if name not in known)]))


def _listed_inventories(client: Client, given: Inventory | Iterable[Inventory]) -> list[Inventory]:
    if isinstance(given, Inventory):
        return [given]
    listed = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(each, Inventory) for each in listed):
        raise ParameterError(f"inventories of {client.name!r} must be Inventory, got {given!r}.")
    return listed


# ── claims ──────────────────────────────────────────────────────────────────────────────────────────


def _of_records(
    adversary: str,
    members: Sequence[_Member],
    server: FederatedServer | None,
    of_server: Claim | None,
    delta: float,
    *,
    shared: bool,
) -> list[Claim]:
    """What is promised about a record, or a person."""
    if not members:
        why = "nothing is known here of what clients do; each has a report of its own"
        by_server = server_claim_for_records(server, of_server, delta)
        return [by_server or Claim(against=adversary, unit=_RECORD, because=why)]
    own = {member.name: _about_records(member, adversary) for member in members}
    kept = {name: claim for name, claim in own.items() if claim.guaranteed}
    bare = {name: claim for name, claim in own.items() if not claim.guaranteed}
    by_server = server_claim_for_records(server, of_server, delta) if bare else None
    if shared and len(members) > 1:
        return [_of_persons(adversary, members, kept, bare, by_server, delta)]
    claims = _grouped(adversary, _RECORD, kept, of_all=len(kept) == len(members), several=len(members) > 1)
    if by_server is not None:
        return [*claims, replace(by_server, unit=_unit(_RECORD, bare, of_all=not kept))]
    return [*claims, *_nothing(adversary, _RECORD, bare, of_all=not kept)]


def _about_records(member: _Member, adversary: str) -> Claim:
    """A client's claim for its records: its own, or what it claims of its whole data, of which each is a part."""
    own, whole = member.claim(adversary, _RECORD), member.claim(adversary, UNIT)
    if own.guaranteed or not whole.guaranteed or not protects_all_of_a_client(member.client):
        return own
    return replace(whole, unit=_RECORD, because=f"a record is part of its client's data; {whole.because}")


def _of_persons(
    adversary: str,
    members: Sequence[_Member],
    kept: Mapping[str, Claim],
    bare: Mapping[str, Claim],
    by_server: Claim | None,
    delta: float,
) -> Claim:
    """What is promised to a person with a record at each client."""
    unit = "person with a record at each client"
    if bare:
        if by_server is not None and not kept:
            why = "a person with records at several clients changes the data of all of them"
        else:
            why = _in_words(bare, of=len(members))
        return Claim(against=adversary, unit=unit, because=why)
    epsilon, relation, why_not = composed_over([member.client for member in members], delta)
    if epsilon is None:
        return Claim(against=adversary, unit=unit, because=why_not)
    return Claim(
        against=adversary,
        unit=unit,
        because="all releases in the ledgers of all clients, composed",
        epsilon=epsilon,
        delta=delta,
        relation=f"{relation} at each client",
        assumes=("a person has at most one record at a client", *_assumptions(kept)),
    )


def _of_clients(adversary: str, members: Sequence[_Member], of_server: Claim | None) -> list[Claim]:
    """What is promised about a client's whole data: by the server's noise, or by the client's own."""
    own = {member.name: member.claim(adversary, UNIT) for member in members}
    kept = {name: claim for name, claim in own.items() if claim.guaranteed}
    claims = [] if of_server is None or not of_server.guaranteed else [of_server]
    claims += _grouped(adversary, UNIT, kept, of_all=len(kept) == len(members), several=len(members) > 1)
    if claims and (claims[0] is of_server or len(kept) == len(members)):
        return claims
    why = "nothing is known here of the server's part" if of_server is None else of_server.because
    bare = [name for name in own if name not in kept]
    return [*claims, Claim(against=adversary, unit=_unit(UNIT, bare, of_all=not kept), because=why)]


def _of_other_units(adversary: str, members: Sequence[_Member]) -> list[Claim]:
    """What clients say besides, of labels for instance."""
    claims: list[Claim] = []
    units = [claim.unit for member in members if member.report is not None for claim in member.report.claims]
    for unit in dict.fromkeys(units):
        if unit in (_RECORD, UNIT):
            continue
        own = {member.name: member.claim(adversary, unit) for member in members}
        kept = {name: claim for name, claim in own.items() if claim.guaranteed}
        claims += _grouped(adversary, unit, kept, of_all=len(kept) == len(members), several=len(members) > 1)
        claims += _nothing(adversary, unit, {n: c for n, c in own.items() if n not in kept}, of_all=not kept)
    return claims


def _of_each(adversary: str, members: Sequence[_Member]) -> list[Claim]:
    claims = []
    for member in members:
        of_this = [] if member.report is None else [c for c in member.report.claims if c.against == adversary]
        units = dict.fromkeys(claim.unit for claim in of_this) or {_RECORD: None}
        claims += [replace(member.claim(adversary, unit), unit=f"{unit} of {member.name}") for unit in units]
    return claims


def _grouped(adversary: str, unit: str, claims: Mapping[str, Claim], *, of_all: bool, several: bool) -> list[Claim]:
    """One claim for each relation: the largest of its clients'."""
    found: list[Claim] = []
    for relation in dict.fromkeys(claim.relation for claim in claims.values()):
        group = {name: claim for name, claim in claims.items() if claim.relation == relation}
        most = max(group, key=lambda name: group[name].epsilon or 0.0)
        because = group[most].because
        if len(group) > 1:
            because = f"the largest of {len(group)} clients', that of {most}: {because}"
        disjoint = ("no person has records with two clients",) if unit == _RECORD and several else ()
        found.append(
            Claim(
                against=adversary,
                unit=_unit(unit, group, of_all=of_all and len(group) == len(claims)),
                because=because,
                epsilon=group[most].epsilon,
                delta=group[most].delta,
                relation=relation,
                assumes=(*disjoint, *_assumptions(group)),
            )
        )
    return found


def _nothing(adversary: str, unit: str, claims: Mapping[str, Claim], *, of_all: bool) -> list[Claim]:
    if not claims:
        return []
    return [
        Claim(against=adversary, unit=_unit(unit, claims, of_all=of_all), because=_in_words(claims, of=len(claims)))
    ]


# ── words ───────────────────────────────────────────────────────────────────────────────────────────


def _title(server: FederatedServer | None, members: Sequence[_Member]) -> str:
    clients = f"{len(members)} client{'' if len(members) == 1 else 's'}"
    if server is None:
        return f"A federation of {clients}"
    told = "" if _participation_is_secret(server) else f", {clients}"
    return f"Federation {server.federation!r}: {server.round} rounds{told}"


def _participation_is_secret(server: FederatedServer | None) -> bool:
    return server is not None and server.plan is not None and server.plan.amplified


def _open_points(members: Sequence[_Member]) -> tuple[str, ...]:
    """What leaves without protection, and in whose reply."""
    own = {
        member.name: (
            *_sent_as_it_is(member.exposed),
            *(text for text in (() if member.report is None else member.report.not_covered) if text not in NOT_COVERED),
        )
        for member in members
    }
    return (*NOT_COVERED, *_together(own))


def _sent_as_it_is(exposed: Sequence[tuple[str, str]]) -> Iterator[str]:
    for kind in dict.fromkeys(kind for _, kind in exposed):
        names = [name for name, other in exposed if other == kind]
        many = kind in ("parameter", "buffer")  # a network has hundreds; its inventory names them all
        told = _listed(names) if many else ", ".join(names)
        yield f"{told} ({kind}) {'is sent as it is' if len(names) == 1 else 'are sent as they are'}, {UNPROTECTED}"


def _assumptions(claims: Mapping[str, Claim]) -> tuple[str, ...]:
    return _together({name: claim.assumes for name, claim in claims.items()})


def _together(texts: Mapping[str, tuple[str, ...]], of: int | None = None) -> tuple[str, ...]:
    """What all clients (of so many) say, once; what some say, with their names."""
    everybody = len(texts) if of is None else of
    who: dict[str, list[str]] = {}
    for name, said in texts.items():
        for text in said:
            who.setdefault(text, []).append(name)
    return tuple(text if len(names) == everybody else f"{_named(names)}: {text}" for text, names in who.items())


def _in_words(claims: Mapping[str, Claim], *, of: int) -> str:
    return "; ".join(_together({name: (claim.because,) for name, claim in claims.items()}, of=of))


def _unit(unit: str, names: Iterable[str], *, of_all: bool) -> str:
    return unit if of_all else f"{unit} ({_named(list(names))})"


def _named(names: Sequence[str]) -> str:
    return f"client{'' if len(names) == 1 else 's'} {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
