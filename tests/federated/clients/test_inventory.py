"""Everything in a reply is listed with what covers it, and nothing un-noised is sent unless it was asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpdl.federated.inventory import UNPROTECTED, Inventory
from dpdl.federated.messages import FitReply
from dpdl.federated.plain_client import PlainClient
from tests.federated.clients.worlds import DELTA, N, client, network, records, request, sgd


class Counting(nn.Module):
    """A network with buffers, which the client's own loop writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


def train(model: Any, optimizer: Any, loader: Any, steps: int) -> dict[str, float]:
    taken = 0
    while taken < steps:
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                model.seen += len(x)
                model.mean += x.sum(0)
            taken += 1
            if taken == steps:
                break
    return {"rows": 12.0}


def complete(answer: object) -> FitReply:
    """A reply whose inventory has an entry for each thing that leaves, and no other."""
    assert isinstance(answer, FitReply), answer
    listed = {release.name: release for release in answer.releases}
    leaving = {*answer.update, *answer.metrics, *(["weight"] if answer.weight != 1.0 else [])}
    assert set(listed) == leaving
    assert len(listed) == len(answer.releases)
    for name, tensor in answer.update.items():
        assert listed[name].shape == tuple(tensor.shape)
    assert Inventory.from_list(answer.releases.to_list()) == answer.releases
    return answer


def test_by_default_only_protected_parameters_leave() -> None:
    for given in (None, train):
        answer = complete(client(model=Counting, train=given).answer(request(state=Counting().state_dict())))
        assert set(answer.update) == {f"inner.{name}" for name in network().state_dict()}
        assert not answer.releases.unprotected
        assert {release.kind for release in answer.releases} == {"parameter"}
        assert all("DP-SGD: 3 steps" in release.mechanism for release in answer.releases)
        assert (answer.metrics, answer.weight) == ({}, 1.0)


def test_what_is_asked_for_is_listed_as_unprotected_and_ends_the_claim() -> None:
    ward = client(
        model=Counting, train=train, send_buffers=True, metrics=["rows", "examples"], weight=16.0, batch_size=N
    )
    answer = complete(ward.answer(request(state=Counting().state_dict())))
    kinds = {release.name: release.kind for release in answer.releases.unprotected}
    assert kinds == {"seen": "buffer", "mean": "buffer", "rows": "metric", "examples": "count", "weight": "count"}
    assert answer.metrics == {"rows": 12.0, "examples": N}
    report = ward.report(DELTA)
    assert not any(claim.guaranteed for claim in report.claims)
    assert "buffers are sent" in str(report)


def test_buffers_are_sent_as_differences() -> None:
    ward = client(model=Counting, train=train, send_buffers=True, batch_size=N)
    state = {**Counting().state_dict(), "seen": torch.tensor(100)}
    answer = complete(ward.answer(request(state=state)))
    assert answer.update["seen"].item() == 3 * N
    assert answer.update["seen"].dtype == torch.int64
    assert answer.state["seen"].item() == 100 + 3 * N
    assert {r.name for r in answer.releases.unprotected} == {"seen", "mean"}


def test_a_metric_ends_the_claim_against_the_server_alone_and_a_count_does_not() -> None:
    losing = client(metrics=["loss"])
    answer = complete(losing.answer(request()))
    assert 0.0 < answer.metrics["loss"] < 5.0
    assert [release.mechanism for release in answer.releases if release.name == "loss"] == [UNPROTECTED]
    told = {claim.against: claim.guaranteed for claim in losing.report(DELTA).claims}
    assert told == {"server": False, "other clients": True, "model consumers": True}
    assert "loss without noise" in str(losing.report(DELTA))
    counting = client(metrics=["examples"])
    complete(counting.answer(request()))
    assert all(claim.guaranteed for claim in counting.report(DELTA).claims)
    assert "number of its records" in str(counting.report(DELTA))


def test_a_metric_that_the_loop_did_not_return_breaks_the_round_off() -> None:
    assert (
        client(train=train, model=Counting, metrics=["other"]).answer(request(state=Counting().state_dict())).reason
        == "failed"
    )  # type: ignore[union-attr]


def test_the_report_names_unit_relation_assumptions_and_the_seed() -> None:
    text = str(client(train=train, insecure_seed=1, proximal=0.1).report(DELTA))
    for part in ("record", "adding or removing one record", "training loop", "insecure_seed", "took part", "DP-SGD"):
        assert part in text, part


def test_a_plain_client_protects_nothing() -> None:
    plain = PlainClient(
        "plain",
        Counting,
        TensorDataset(*records()),
        nn.functional.cross_entropy,
        optimizer=sgd(),
        batch_size=4,
        steps=2,
        send_buffers=True,
        metrics=["loss", "examples"],
        weight=16.0,
    )
    answer = complete(plain.answer(request(state=Counting().state_dict())))
    assert len(answer.releases.unprotected) == len(answer.releases) == 4 + 2 + 2 + 1
    assert str(plain.report(DELTA)).count("NO GUARANTEE") == 3
