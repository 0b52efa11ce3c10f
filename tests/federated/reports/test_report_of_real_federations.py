"""The report of federations of real clients and servers: each scheme alone, and all together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from accountants import Gaussian
from dpdl.claims import AdversaryReport, Claim
from dpdl.federated.client import DPClient
from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.federated.local_updates import LocalUpdateDP
from dpdl.federated.plain_client import PlainClient
from dpdl.federated.report import ADVERSARIES
from dpdl.federated.server import FederatedServer
from dpdl.ledger import Ledger
from tests.federated.reports.told import (
    REPLACE_ONE,
    Told,
    claims,
    ledger_of,
    only,
    pld_epsilon,
    report_of,
)

# ── the server's noise, and all together, with the real parts ───────────────────────────────────────


def data(seed: int, n: int = 40) -> TensorDataset:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(1) > 0).long())


def net() -> nn.Module:
    return nn.Linear(3, 2)


SGD = partial(torch.optim.SGD, lr=0.1)


def private(name: str, **settings: Any) -> DPClient:
    given: dict[str, Any] = {"noise_multiplier": 1.2, "batch_size": 10, "steps": 2, "ledger": ledger_of(0), **settings}
    return DPClient(name, net, data(len(name)), F.cross_entropy, optimizer=SGD, max_grad_norm=1.0, **given)


def plain(name: str) -> PlainClient:
    return PlainClient(name, net, data(len(name)), F.cross_entropy, optimizer=SGD, batch_size=10, steps=2)


def local(client: Any) -> LocalUpdateDP:
    return LocalUpdateDP(client, max_update_norm=1.0, noise_multiplier=10.0, ledger=Ledger(relation=REPLACE_ONE))


def a_server(**settings: Any) -> FederatedServer:
    plan = ClientLevelPlan(**{"clients": 3, "noise_multiplier": 2.0, "max_update_norm": 1.0, "rounds": 4, **settings})
    return FederatedServer(net(), plan=plan, insecure_seed=1)


def play(server: FederatedServer, clients: Sequence[Any], rounds: int = 4) -> None:
    by_name = {client.name: client for client in clients}
    for _ in range(rounds):
        chosen = server.open_round([*by_name])
        server.close_round([by_name[name].answer(server.request()) for name in chosen])


def test_dp_sgd_at_clients_is_for_records_against_everybody() -> None:
    clients = [private("a"), private("bb")]
    server = FederatedServer(net())
    play(server, clients)
    report = report_of(*clients, server=server)
    expected = pld_epsilon([(1.2, 0.25, 8)])
    for adversary in ADVERSARIES:
        assert only(report, adversary, "record").epsilon == pytest.approx(expected, rel=0.01)
        assert not only(report, adversary, "client").guaranteed


def test_noise_at_the_server_is_for_clients_against_those_who_get_the_model_and_not_the_server() -> None:
    server, clients = a_server(sample_rate=0.5), [plain("a"), plain("bb"), plain("ccc")]
    play(server, clients)
    report = report_of(*clients, server=server)
    for unit in ("record", "client"):
        assert not only(report, "server", unit).guaranteed
    for adversary in ("other clients", "model consumers"):
        assert only(report, adversary, "client").epsilon == pytest.approx(pld_epsilon([(2.0, 0.5, 4)]), rel=0.01)
        record = only(report, adversary, "record")  # as part of the client's data, which is replaced: noise of z / 2
        assert record.epsilon == pytest.approx(pld_epsilon([(2.0, 0.5, 4)], "REPLACE_ONE"), rel=0.01)
        assert record.relation == "replacing one client's whole data"


@pytest.mark.parametrize("relation", ["add_or_remove", "replace_one", "zero_out"])
def test_a_cohort_of_a_fixed_size_is_not_amplified_for_records(relation: str) -> None:
    server, clients = (
        a_server(sampling="fixed_size", cohort=2, relation=relation),
        [plain("a"), plain("bb"), plain("ccc")],
    )
    play(server, clients)
    report = report_of(*clients, server=server)
    of_four = pld_epsilon([(1.0, 1, 4)])  # N(0, 2^2) and two bounds apart
    record = only(report, "model consumers", "record").epsilon
    assert record is not None
    if relation == "replace_one":
        assert record < of_four
        assert record == only(report, "model consumers", "client").epsilon
    else:
        assert record == pytest.approx(of_four, rel=0.01)
    others = claims(report, "other clients", "record")
    if relation == "add_or_remove":
        assert [claim.guaranteed for claim in others] == [False]
    else:
        assert others[0].epsilon == pytest.approx(of_four, rel=0.01)


def test_where_participation_is_secret_the_report_counts_nobody_and_says_that_it_names_some() -> None:
    secret, open_ = a_server(sample_rate=0.5), a_server(sampling="all")
    said = report_of(plain("a"), server=secret)
    assert said.title == "Federation 'federation': 0 rounds"
    assert "without their names and number" in said.notes[0]
    assert report_of(server=secret).notes == ()
    assert report_of(plain("a"), server=open_).title == "Federation 'federation': 0 rounds, 1 client"
    assert not any("without their names" in note for note in report_of(plain("a"), server=open_).notes)


def test_without_clients_the_servers_noise_is_known_and_covers_records_too() -> None:
    server = a_server(sampling="all")
    play(server, [plain("a")], rounds=2)
    report = report_of(server=server)
    assert not only(report, "server", "record").guaranteed
    assert only(report, "model consumers", "record").epsilon == pytest.approx(pld_epsilon([(1.0, 1, 2)]), rel=0.01)


def test_noise_on_updates_is_for_clients_and_so_for_their_records_against_everybody() -> None:
    clients = [local(plain("a")), local(plain("bb"))]
    server = FederatedServer(net())
    play(server, clients)
    report = report_of(*clients, server=server)
    for adversary in ADVERSARIES:
        of_client = only(report, adversary, "client")
        assert of_client.epsilon == pytest.approx(pld_epsilon([(5.0, 1, 4)]), rel=0.01)  # replaced: two bounds
        assert of_client.relation == "replacing the client's whole data"
        assert only(report, adversary, "record").epsilon == of_client.epsilon


def test_a_record_is_not_covered_by_a_clients_claim_of_another_relation() -> None:
    class Removed(Told):
        def report(self, delta: float) -> AdversaryReport:
            claims = (
                Claim(against=each, unit="client", because="noise", epsilon=1.0, delta=delta) for each in ADVERSARIES
            )
            return AdversaryReport(title="r", adversaries=ADVERSARIES, claims=tuple(claims))

    report = report_of(Removed("r", ledger=ledger_of(1)))
    assert only(report, "server", "client").guaranteed
    assert not only(report, "server", "record").guaranteed


def test_record_and_client_level_together_are_two_lines() -> None:
    server, clients = a_server(sampling="all"), [private("a"), private("bb"), private("ccc")]
    play(server, clients)
    report = report_of(*clients, server=server)
    steps = pld_epsilon([(1.2, 0.25, 8)])
    assert only(report, "server", "record").epsilon == pytest.approx(steps, rel=0.01)
    assert not only(report, "server", "client").guaranteed
    for adversary in ("other clients", "model consumers"):
        assert only(report, adversary, "record").epsilon == pytest.approx(steps, rel=0.01)
        assert only(report, adversary, "client").epsilon == pytest.approx(pld_epsilon([(2.0, 1, 4)]), rel=0.01)


def test_a_mixed_federation_says_all_of_it() -> None:
    server = a_server(sampling="all", clients=4)
    clients = [private("a"), plain("bb"), local(plain("ccc")), local(private("dddd"))]
    play(server, clients)
    report = report_of(*clients, server=server)
    found = {(claim.unit, claim.guaranteed) for claim in report.against("server")}
    assert found == {
        ("record (clients 'a', 'dddd')", True),
        ("record (client 'ccc')", True),
        ("record (client 'bb')", False),
        ("client (clients 'ccc', 'dddd')", True),
        ("client (clients 'a', 'bb')", False),
    }
    assert all(claim.guaranteed for claim in report.against("model consumers"))
    assert AdversaryReport.from_json(report.to_json()) == report


def test_normalisation_and_other_releases_in_a_clients_ledger_count() -> None:
    ledger = ledger_of(0)
    ledger.record(Gaussian(1.0), label="normalisation")
    client = private("a", ledger=ledger)
    play(server := FederatedServer(net()), [client], rounds=1)
    expected = pld_epsilon([(1.2, 0.25, 2), (1.0, 1, 1)])
    assert only(report_of(client, server=server), "server", "record").epsilon == pytest.approx(expected, rel=0.01)


def test_without_a_server_its_part_is_unknown_and_not_left_out() -> None:
    for adversary in ADVERSARIES:
        claim = only(report_of(private("a")), adversary, "client")
        assert (claim.guaranteed, claim.because) == (False, "nothing is known here of the server's part")
