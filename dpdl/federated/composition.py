"""What several ledgers of a federation come to together.

A person with records at several clients, or a record that the server's noise protects as part of its client's data: no
one ledger has these figures. They are computed from the events in the ledgers, under one neighbouring relation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from accountants import Event, Gaussian, NeighboringRelation
from dpdl.budget import composed
from dpdl.claims import Claim
from dpdl.federated.messages import Client
from dpdl.federated.server import FederatedServer
from dpdl.federated.server_claims import MODEL_CONSUMERS
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile

__all__ = ["composed_over", "protects_all_of_a_client", "server_claim_for_records"]

REPLACE_ONE = NeighboringRelation.REPLACE_ONE


def composed_over(clients: Iterable[Client], delta: float) -> tuple[float | None, str, str]:
    """The epsilon of whoever has a record at each of these clients.

    The mechanisms of different clients run on different data and draw noise of their own, each seeing what the others
    have released: that is adaptive composition. A ledger that two clients share is one ledger.

    Returns:
        The epsilon, what neighbouring data differ in at a client, and "". None and why, if there is no such figure.
    """
    ledgers: dict[object, Ledger | LedgerFile] = {}
    for client in clients:
        ledger = _of_records(client)
        if ledger is None:
            return None, "", f"client {client.name!r} has no ledger that is known here"
        ledgers.setdefault(id(ledger) if ledger.id is None else ledger.id, ledger)
    counts: dict[Event, int] = {}
    for ledger in ledgers.values():
        if ledger.budget is not None and ledger.budget.adaptive:
            return None, "", f"{ledger.name} is adaptive: its claim is its budget, which does not compose with others"
        for entry in ledger.entries:
            counts[entry.event] = counts.get(entry.event, 0) + entry.count
    relations = {ledger.relation for ledger in ledgers.values()}
    if len(relations) != 1:
        return None, "", "the clients' ledgers are of different neighbouring relations"
    relation = relations.pop()
    return composed(counts, relation).epsilon(delta), relation.phrase.replace("example", "record"), ""


def protects_all_of_a_client(client: Client) -> bool:
    """Whether a client's claim for its whole data is one for each record: neighbours have any other data."""
    ledger = getattr(client, "ledger", None)
    return isinstance(ledger, (Ledger, LedgerFile)) and ledger.relation is REPLACE_ONE


def server_claim_for_records(server: FederatedServer | None, of_client: Claim | None, delta: float) -> Claim | None:
    """What the server's noise promises about one record: as much as to a client whose whole data is replaced.

    Adding or removing a record changes what one client sends, and nothing else. The server clips it before and after,
    so that the sum moves by at most twice the bound: the relation "replace_one", whatever the plan's is.

    Args:
        server: None, or without a plan: there is no such claim.
        of_client: the server's claim for a client, against somebody; where that has no guarantee, this has none.
        delta: in (0, 1).
    """
    if server is None or server.plan is None or server.ledger is None or of_client is None or not of_client.guaranteed:
        return None
    plan, counts = server.plan, dict(server.ledger.counts)
    if plan.cohort is not None and not (plan.neighbours is REPLACE_ONE and of_client.against == MODEL_CONSUMERS):
        rounds = counts.pop(plan.event(), 0)  # amplified, or of two bounds: neither is of this relation
        bare = Gaussian(plan.noise_multiplier)
        counts[bare] = counts.get(bare, 0) + rounds
    return replace(
        of_client,
        unit="record",
        epsilon=composed(counts, REPLACE_ONE).epsilon(delta),
        relation="replacing one client's whole data",
        because=f"a record is part of its client's data; {of_client.because}",
    )


def _of_records(client: Client) -> Ledger | LedgerFile | None:
    """The ledger behind a client's claim for its records: its own, or that of the client which it wraps."""
    inner = getattr(client, "client", None)
    wrapped = None if inner is None else _of_records(inner)
    ledger = getattr(client, "ledger", None)
    return wrapped or (ledger if isinstance(ledger, (Ledger, LedgerFile)) else None)
