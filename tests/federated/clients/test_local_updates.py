"""An update that is clipped and noised before it leaves: norm, scale, accounting, refusals, and what wraps what."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import accountants
import dpdl
from accountants import Gaussian
from dpdl.errors import LedgerError, ParameterError
from dpdl.federated.inventory import UNPROTECTED, Inventory, Release
from dpdl.federated.local_updates import LocalUpdateDP
from dpdl.federated.messages import FitReply, FitRequest, Refusal
from dpdl.federated.plain_client import PlainClient
from dpdl.federated.reply_store import ReplyStore
from tests.federated.clients.worlds import DELTA, client, network, records, request, same, sgd, weights

S, Z = 0.75, 4.0


class Fixed:
    """A client that has always learnt the same."""

    name = "fixed"

    def __init__(self, update: dict[str, Tensor], *, refuses: bool = False, **also: Any) -> None:
        self.update = update
        self.refuses = refuses
        self.also = also
        self.asked = 0

    def answer(self, request: FitRequest) -> FitReply | Refusal:
        self.asked += 1
        if self.refuses:
            return Refusal(client=self.name, round=request.round, reason="failed")
        kinds = {name: "buffer" if "buffer" in name else "parameter" for name in self.update}
        kinds |= dict.fromkeys(self.also.get("metrics", {}), "metric")
        releases = [Release(name=name, kind=kind, mechanism=UNPROTECTED) for name, kind in kinds.items()]
        return FitReply(
            client=self.name,
            round=request.round,
            update=self.update,
            base=request.state,
            releases=Inventory(tuple(releases)),
            **self.also,
        )


def local(inner: Any, ledger: Any = None, **changed: Any) -> LocalUpdateDP:
    settings: dict[str, Any] = {"max_update_norm": S, "noise_multiplier": Z}
    settings["ledger"] = dpdl.Ledger(relation="replace_one") if ledger is None else ledger
    return LocalUpdateDP(inner, **{**settings, **changed})


def sent(asked: LocalUpdateDP, round: int = 1, **changed: Any) -> dict[str, Tensor]:
    answer = asked.answer(request(round, state={}, **changed))
    assert isinstance(answer, FitReply), answer
    return dict(answer.update)


def vector(length: float, size: int = 6000) -> dict[str, Tensor]:
    """An update of that L2 norm, in two tensors."""
    whole = torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = whole * (length / whole.norm())
    return {"a": whole[: size // 3].reshape(2, -1), "b": whole[size // 3 :]}


def flat(update: dict[str, Tensor]) -> Tensor:
    return torch.cat([update[name].flatten().double() for name in ("a", "b")])


def has_scale(values: Tensor, std: float) -> bool:
    """Whether independent normals have that standard deviation: five deviations of chi-square's, 5 % for 6,000."""
    count = values.numel()
    square = float(values.square().mean()) / std**2
    return abs(square - 1) < 5 * math.sqrt(2 / count) and abs(float(values.mean())) < 5 * std / math.sqrt(count)


@pytest.mark.parametrize("length", [0.0, 0.3, 10.0, 1e30])
def test_the_noise_is_on_the_update_clipped_to_its_norm(length: float) -> None:
    clipped = vector(min(length, S))
    noise = flat(sent(local(Fixed(vector(length))))) - flat(clipped)
    assert has_scale(noise, Z * S)
    for wrong in (0.5, 0.9, 1.1, 2.0):
        assert not has_scale(noise * wrong, Z * S)
    assert has_scale(noise[:2000], Z * S)
    assert has_scale(noise[2000:], Z * S)


def test_the_norm_is_that_of_the_whole_update() -> None:
    """The clipped update under next to no noise."""
    for length in (0.5, S, 2.0, 100.0):
        kept = flat(sent(local(Fixed(vector(length)), noise_multiplier=1e-13)))
        assert float(kept.norm()) == pytest.approx(min(length, S), rel=1e-7)
        assert float(kept.norm()) <= S * (1 + 1e-9)
        torch.testing.assert_close(kept / kept.norm(), flat(vector(1.0)), rtol=1e-5, atol=1e-8)


def test_an_update_that_is_not_finite_becomes_noise_alone() -> None:
    empty = {name: torch.zeros_like(t) for name, t in vector(1.0).items()}
    for bad in (math.nan, math.inf):
        broken = vector(1.0)
        broken["b"][7] = bad
        assert same(sent(local(Fixed(broken), insecure_seed=3)), sent(local(Fixed(empty), insecure_seed=3)))


def test_numbers_of_a_float32_update_and_scalars_are_noised_too() -> None:
    update = {"a": torch.zeros(3000), "b": torch.zeros(3000), "scalar": torch.tensor(0.0)}
    found = sent(local(Fixed(update)))
    assert found["a"].dtype == torch.float32
    assert found["scalar"].shape == ()
    assert found["scalar"] != 0
    assert has_scale(flat(found), Z * S)
    assert float(flat(found)[:3000] @ flat(found)[3000:]) / 3000 / (Z * S) ** 2 < 0.1  # no two share noise


@pytest.mark.parametrize("rounds", [1, 3, 10])
def test_every_participation_composes_as_replacing_the_whole(rounds: int, tmp_path: Path) -> None:
    asked = local(Fixed(vector(1.0)), tmp_path / "l")
    for round in range(1, rounds + 1):
        sent(asked, round, federation="a" if round % 2 else "b")
    # Sensitivity 2 S under noise Z S is a Gaussian of half the multiplier, and T of them one of 1 / sqrt(T) of that.
    one = accountants.PRVAccountant().compose(Gaussian(Z / 2 / math.sqrt(rounds)))
    assert asked.epsilon(DELTA) == pytest.approx(one.epsilon(DELTA), rel=1e-6)
    not_doubled = accountants.PRVAccountant().compose(Gaussian(Z / math.sqrt(rounds)))
    assert asked.epsilon(DELTA) > 1.5 * not_doubled.epsilon(DELTA)
    assert asked.ledger.entries[0].event == Gaussian(Z)
    assert sum(asked.spending(DELTA).rounds.values()) == rounds == asked.spending(DELTA).releases
    assert dpdl.LedgerFile(tmp_path / "l", relation="replace_one").epsilon(DELTA) == asked.epsilon(DELTA)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_an_update_that_would_overspend_is_refused_before_the_client_is_asked(kind: str, tmp_path: Path) -> None:
    one = accountants.PRVAccountant().compose(Gaussian(Z / 2)).epsilon(DELTA)
    budget = dpdl.Budget(epsilon=one * 1.01, delta=DELTA)
    ledger = (
        dpdl.LedgerFile(tmp_path / "l", relation="replace_one", budget=budget)
        if kind == "file"
        else dpdl.Ledger(relation="replace_one", budget=budget)
    )
    inner = Fixed(vector(1.0))
    sent(local(inner, ledger))
    refusal = local(inner, ledger).answer(request(2, state={}))
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, inner.asked) == ("budget", 1)
    assert ledger.releases == 1


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_client_that_fails_has_sent_nothing_and_spends_all_the_same(kind: str, tmp_path: Path) -> None:
    ledger = tmp_path / "l" if kind == "file" else dpdl.Ledger(relation="replace_one")
    inner = Fixed(vector(1.0), refuses=True)
    asked = local(inner, ledger)
    assert asked.answer(request(state={})).reason == "failed"  # type: ignore[union-attr]
    assert asked.ledger.releases == 1
    assert not any(claim.guaranteed for claim in asked.report(DELTA).claims)
    for again in (asked, local(inner, asked.ledger)):
        assert again.answer(request(state={})).reason == "request"  # type: ignore[union-attr]
    assert (asked.ledger.releases, inner.asked) == (1, 1)
    asked.go_on(not_the_data="the disk was full")
    assert all("'the disk was full'" in str(claim) for claim in asked.report(DELTA).claims)
    inner.refuses = False
    sent(asked)
    assert asked.ledger.releases == 2
    for bad in (request(0, state={}), request(federation="", state={})):
        assert asked.answer(bad).reason == "request"  # type: ignore[union-attr]
    with pytest.raises(ParameterError, match="client must be one that answers"):
        local(object())  # it would have no name to refuse under


@pytest.mark.parametrize("where", [None, "replies"])
def test_the_same_request_gets_the_same_noise(where: str | None, tmp_path: Path) -> None:
    inner = Fixed(vector(1.0))
    asked = local(inner, replies=None if where is None else tmp_path / where)
    first = sent(asked)
    assert same(sent(asked), first)
    assert (asked.ledger.releases, inner.asked) == (1, 1)
    other = sent(asked, federation="b")
    assert not same(other, first)
    assert asked.ledger.releases == 2
    if where is not None:
        assert same(sent(local(inner, asked.ledger, replies=ReplyStore(tmp_path / where))), first)
        assert asked.ledger.releases == 2


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_under_a_seed_no_two_requests_or_updates_share_noise_and_the_same_again_counts_once(
    kind: str, tmp_path: Path
) -> None:
    ledger = (
        dpdl.LedgerFile(tmp_path / "l", relation="replace_one")
        if kind == "file"
        else dpdl.Ledger(relation="replace_one")
    )
    first = sent(local(Fixed(vector(1.0)), ledger, insecure_seed=1))
    assert same(sent(local(Fixed(vector(1.0)), ledger, insecure_seed=1)), first)
    assert ledger.releases == 1
    changed = {name: -tensor for name, tensor in vector(1.0).items()}  # the data was corrected meanwhile
    other = sent(local(Fixed(changed), ledger, insecure_seed=1))
    assert float((flat(other) - flat(first)).norm()) > 100
    assert ledger.releases == 2
    asked = local(Fixed(vector(1.0)), ledger, insecure_seed=1).answer(request(state=weights()))
    assert isinstance(asked, FitReply)
    assert float((flat(dict(asked.update)) - flat(first)).norm()) > 100
    assert ledger.releases == 3


def test_what_is_no_number_to_add_noise_to_stays_at_home_and_the_inventory_says_all() -> None:
    update = {**vector(1.0), "buffer mean": torch.zeros(3), "buffer count": torch.tensor(3)}
    answer = local(Fixed(update, metrics={"loss": 0.5}, weight=600.0)).answer(request(state={}))
    assert isinstance(answer, FitReply)
    assert answer.weight == 1.0
    assert answer.metrics == {"loss": 0.5}
    assert set(answer.update) == {"a", "b", "buffer mean"}
    assert (answer.update["buffer mean"] != 0).all()
    listed = {release.name: release for release in answer.releases}
    assert set(listed) == {"a", "b", "buffer mean", "loss"}
    assert [name for name, release in listed.items() if not release.protected] == ["loss"]
    assert "0.75" in listed["a"].mechanism


def test_the_report_has_both_guarantees_around_a_private_client() -> None:
    ward = client()
    asked = local(ward)
    answer = asked.answer(request())
    assert isinstance(answer, FitReply)
    assert all("DP-SGD" in release.mechanism and "whole update" in release.mechanism for release in answer.releases)
    report = asked.report(DELTA)
    for adversary in report.adversaries:
        units = {claim.unit: claim.epsilon for claim in report.against(adversary)}
        assert units == {"client": asked.epsilon(DELTA), "record": ward.epsilon(DELTA)}
    assert "replacing the client's whole data" in str(report)
    assert (asked.name, asked.client) == ("ward", ward)


def plain(**changed: Any) -> PlainClient:
    settings: dict[str, Any] = {"optimizer": sgd(), "batch_size": 4, "steps": 2, **changed}
    return PlainClient("plain", network, TensorDataset(*records()), nn.functional.cross_entropy, **settings)


def test_around_a_plain_client_the_claim_is_the_clients_and_metrics_end_it_against_the_server() -> None:
    asked = local(plain(weight=16.0))
    answer = asked.answer(request())
    assert isinstance(answer, FitReply)
    assert answer.weight == 1.0
    assert not answer.releases.unprotected
    assert isinstance(asked.answer(request()), FitReply)
    both = [("client", True), ("record", False)]
    assert [(c.unit, c.guaranteed) for c in asked.report(DELTA).claims] == both * 3
    for telling in (local(plain(metrics=["loss"])), local(client(metrics=["examples"]))):
        told = {claim.against: claim.guaranteed for claim in telling.report(DELTA).claims if claim.unit == "client"}
        assert told == {"server": False, "other clients": True, "model consumers": True}


def test_arguments_out_of_range_and_ledgers_of_another_relation_are_refused(tmp_path: Path) -> None:
    for changed in (
        {"max_update_norm": 0.0},
        {"max_update_norm": math.inf},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"insecure_seed": -1},
    ):
        with pytest.raises(ParameterError):
            local(plain(), **changed)
    with pytest.raises(LedgerError, match="replac"):
        local(plain(), dpdl.Ledger(relation="add_or_remove"))
    ward = client(tmp_path / "ward.ledger")
    with pytest.raises(LedgerError):
        local(ward, tmp_path / "ward.ledger")  # the records' ledger is not the client's
