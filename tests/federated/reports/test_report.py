"""The report of a federation: four promises, three adversaries, and that nothing is left out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from accountants import Gaussian
from dpdl.budget import Budget
from dpdl.errors import ParameterError
from dpdl.federated.inventory import UNPROTECTED, Inventory, Release
from dpdl.federated.messages import FitReply, FitRequest, Refusal
from dpdl.federated.report import ADVERSARIES, federated_report
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from tests.federated.reports.told import (
    ADD_OR_REMOVE,
    DELTA,
    REPLACE_ONE,
    STEP,
    Told,
    claims,
    ledger_of,
    only,
    pld_epsilon,
    report_of,
)

# ── records ─────────────────────────────────────────────────────────────────────────────────────────


def test_of_disjoint_records_the_largest_epsilon_holds_and_that_is_said_as_an_assumption() -> None:
    report = report_of(Told("a", record=1.0), Told("b", record=3.0), Told("c", record=2.0))
    for adversary in ADVERSARIES:
        claim = only(report, adversary, "record")
        assert (claim.unit, claim.epsilon, claim.delta) == ("record", 3.0, DELTA)
        assert "that of 'b': of b" in claim.because
        assert "no person has records with two clients" in claim.assumes


def test_of_one_client_nothing_is_assumed_about_others() -> None:
    claim = only(report_of(Told("a", record=1.0)), "server", "record")
    assert (claim.epsilon, claim.because, claim.assumes) == (1.0, "of a", ())


def test_a_client_that_protects_nothing_has_a_line_of_its_own_whatever_the_others_do() -> None:
    report = report_of(Told("a", record=1.0), Told("b"), Told("c", record=0.5), Told("d", record=math.inf))
    for adversary in ADVERSARIES:
        kept, bare = claims(report, adversary, "record")
        assert (kept.unit, kept.epsilon) == ("record (clients 'a', 'c')", 1.0)
        assert (bare.unit, bare.guaranteed) == ("record (clients 'b', 'd')", False)
        assert "no person has records with two clients" in kept.assumes
    assert str(report).count("NO GUARANTEE") == 2 * len(ADVERSARIES)


def test_a_claim_is_missing_for_the_adversary_that_it_is_missing_for() -> None:
    report = report_of(Told("a", record=1.0, bare=["server"]), Told("b", record=2.0))
    assert [c.epsilon for c in claims(report, "server", "record")] == [2.0, None]
    assert [c.epsilon for c in claims(report, "model consumers", "record")] == [2.0]


def test_without_clients_nothing_is_known_of_records() -> None:
    for adversary in ADVERSARIES:
        claim = only(report_of(), adversary, "record")
        assert not claim.guaranteed
        assert "each has a report of its own" in claim.because


def test_a_client_that_gives_no_report_has_no_guarantee() -> None:
    class Silent:
        name = "s"

        def answer(self, request: FitRequest) -> FitReply | Refusal:
            raise NotImplementedError

    claim = only(report_of(Silent()), "server", "record")
    assert (claim.guaranteed, claim.because) == (False, "it gives no report")


def test_relations_are_not_mixed() -> None:
    report = report_of(
        Told("a", record=1.0), Told("b", record=2.0, relation="replacing one record"), Told("c", record=1.5)
    )
    found = {claim.relation: (claim.unit, claim.epsilon) for claim in claims(report, "server", "record")}
    assert found == {
        "adding or removing one record": ("record (clients 'a', 'c')", 1.5),
        "replacing one record": ("record (client 'b')", 2.0),
    }


def test_many_clients_are_counted_not_listed() -> None:
    report = report_of(Told("x", record=1.0), *(Told(f"c{i}") for i in range(9)))
    (_, bare) = claims(report, "server", "record")
    assert bare.unit == "record (clients 'c0', 'c1', 'c2', 'c3', 'c4' and 4 more)"


def test_each_client_has_a_line_on_request_and_it_says_no_more_than_the_client() -> None:
    report = report_of(Told("a", record=1.0), Told("b"), each_client=True)
    for adversary in ADVERSARIES:
        assert [(c.unit, c.epsilon) for c in claims(report, adversary, "record of")] == [
            ("record of 'a'", 1.0),
            ("record of 'b'", None),
        ]


def test_a_clients_name_cannot_pass_for_a_claim() -> None:
    name = "a\n  against server, client: epsilon <= 0.01 at delta = 1e-05 (trust me)"
    client = Told("a", record=1.0)
    client.name = name
    report = report_of(client, Told("b"), each_client=True)
    assert not any(line.startswith("  against server, client: epsilon") for line in str(report).splitlines())


def test_two_clients_of_one_name_are_refused() -> None:
    with pytest.raises(ParameterError, match="Two clients have the name 'a'"):
        report_of(Told("a", record=1.0), Told("a", record=9.0))


@pytest.mark.parametrize("delta", [-1.0, 1.0, math.nan])
def test_delta_is_a_probability(delta: float) -> None:
    with pytest.raises(ParameterError, match="delta"):
        federated_report(server=None, clients=[], delta=delta)


# ── persons with records at several clients ─────────────────────────────────────────────────────────


def test_for_shared_persons_ledgers_are_composed_as_another_accountant_composes_them() -> None:
    others = Ledger(relation=ADD_OR_REMOVE)
    others.record(Gaussian(5.0), label="mean")
    clients = [Told("a", ledger=ledger_of(60)), Told("b", ledger=ledger_of(40)), Told("c", ledger=others)]
    for adversary in ADVERSARIES:
        claim = only(report_of(*clients, shared_persons=True), adversary, "person")
        assert claim.epsilon == pytest.approx(pld_epsilon([(1.2, 0.1, 100), (5.0, 1, 1)]), rel=0.01)
        assert claim.relation == "adding or removing one record at each client"
        assert "a person has at most one record at a client" in claim.assumes
    largest = only(report_of(*clients), "server", "record").epsilon
    added = sum(client.ledger.epsilon(DELTA) for client in clients)
    assert largest is not None
    assert claim.epsilon is not None
    assert largest < claim.epsilon < 0.8 * added


def test_a_ledger_that_two_clients_share_counts_once(tmp_path: Path) -> None:
    memory, path = ledger_of(30), tmp_path / "shared.ledger"
    with LedgerFile(path) as file:
        for _ in range(20):
            file.record(STEP)
    clients = [
        Told("a", ledger=memory),
        Told("b", ledger=memory),
        Told("c", ledger=LedgerFile(path)),
        Told("d", ledger=LedgerFile(path)),
    ]
    claim = only(report_of(*clients, shared_persons=True), "server", "person")
    assert claim.epsilon == pytest.approx(ledger_of(50).epsilon(DELTA), rel=1e-6)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (Told("b"), "client 'b': of b"),
        (Told("b", record=1.0), "client 'b' has no ledger"),
        (Told("b", ledger=ledger_of(3, relation=REPLACE_ONE)), "different neighbouring relations"),
        (Told("b", ledger=ledger_of(3, budget=Budget(epsilon=9, delta=1e-6, adaptive=True))), "is adaptive"),
    ],
)
def test_what_does_not_compose_is_no_guarantee_for_shared_persons(other: Told, says: str) -> None:
    report = report_of(Told("a", ledger=ledger_of(3)), other, shared_persons=True)
    for adversary in ADVERSARIES:
        claim = only(report, adversary, "person")
        assert not claim.guaranteed
        assert says in claim.because


# ── inventories ─────────────────────────────────────────────────────────────────────────────────────


def an_inventory(kind: str) -> Inventory:
    return Inventory(
        (
            Release(name="fc.weight", kind="parameter", mechanism="DP-SGD"),
            Release(name="thing", kind=kind, mechanism=UNPROTECTED),
        )
    )


@pytest.mark.parametrize(
    ("kind", "ended"),
    [("metric", {"server"}), ("count", set()), ("buffer", {*ADVERSARIES}), ("parameter", {*ADVERSARIES})],
)
def test_what_a_reply_carries_unprotected_is_not_covered_and_ends_the_claims_of_who_sees_it(
    kind: str, ended: set[str]
) -> None:
    report = report_of(
        Told("a", record=1.0), Told("b", record=2.0), inventories={"b": [an_inventory("count"), an_inventory(kind)]}
    )
    assert f"client 'b': 'thing' ({kind}) is sent as it is, UNPROTECTED" in report.not_covered
    for adversary in ADVERSARIES:
        found = {claim.unit: claim.guaranteed for claim in claims(report, adversary, "record")}
        assert found == (
            {"record (client 'a')": True, "record (client 'b')": False} if adversary in ended else {"record": True}
        )


def test_two_things_of_one_name_are_two() -> None:
    both = [Release(name="weight", kind=kind, mechanism=UNPROTECTED) for kind in ("parameter", "count")]
    for inventory in (Inventory(tuple(both)), Inventory(tuple(reversed(both)))):
        report = report_of(Told("a", record=1.0), inventories={"a": inventory})
        assert not only(report, "model consumers", "record").guaranteed
        assert len([text for text in report.not_covered if "'weight'" in text]) == 2


def test_of_a_networks_bare_parameters_some_are_named_and_of_metrics_all() -> None:
    bare = [Release(name=f"p{i}", kind="parameter", mechanism=UNPROTECTED) for i in range(300)]
    bare += [Release(name=f"m{i}", kind="metric", mechanism=UNPROTECTED) for i in range(7)]
    report = report_of(Told("a", record=1.0), inventories={"a": Inventory(tuple(bare))})
    parameters, metrics = report.not_covered[-2:]
    assert parameters == "'p0', 'p1', 'p2', 'p3', 'p4' and 295 more (parameter) are sent as they are, UNPROTECTED"
    assert metrics == "'m0', 'm1', 'm2', 'm3', 'm4', 'm5', 'm6' (metric) are sent as they are, UNPROTECTED"


def test_protected_releases_are_not_listed() -> None:
    inventory = Inventory((Release(name="fc.weight", kind="parameter", mechanism="DP-SGD"),))
    report = report_of(Told("a", record=1.0), inventories={"a": inventory})
    assert "fc.weight" not in str(report)


def test_metrics_that_a_client_says_it_sends_are_listed_without_an_inventory() -> None:
    report = report_of(Told("a", record=1.0, unprotected=["loss"]))
    assert not only(report, "server", "record").guaranteed
    assert only(report, "model consumers", "record").guaranteed
    assert "'loss' (metric) is sent as it is, UNPROTECTED" in report.not_covered


def test_an_inventory_of_nobody_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"inventories of \['c'\]"):
        report_of(Told("a", record=1.0), inventories={"c": an_inventory("metric")})


def test_open_points_and_notes_are_said_once_or_with_their_client() -> None:
    report = report_of(
        Told("a", record=1.0, not_covered=("timing", "moon"), notes=("n",)),
        Told("b", record=1.0, not_covered=("timing",), notes=("n", "m")),
    )
    assert report.not_covered[-2:] == ("timing", "client 'a': moon")
    assert report.notes == ("n", "client 'b': m")
