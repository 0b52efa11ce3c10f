"""A request that was answered gets the same bytes again: no new noise, no new spending, also after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dpdl
from dpdl.errors import CheckpointError, ParameterError
from dpdl.federated.messages import FitReply, Refusal
from dpdl.federated.reply_store import ReplyStore
from tests.federated.clients.worlds import Untouched, client, ledger_file, request, same, weights


def reply(answer: object) -> FitReply:
    assert isinstance(answer, FitReply), answer
    return answer


def equal(a: FitReply, b: FitReply) -> bool:
    return same(a.update, b.update) and (a.client, a.round, a.releases, a.weight, a.metrics) == (
        *(b.client, b.round, b.releases, b.weight),
        b.metrics,
    )


@pytest.mark.parametrize("where", [None, "replies"])
def test_the_same_request_gets_the_same_reply_and_costs_nothing(where: str | None, tmp_path: Path) -> None:
    ward = client(metrics=["loss", "examples"], weight=2.0, replies=None if where is None else tmp_path / where)
    first = reply(ward.answer(request()))
    kept = {name: tensor.clone() for name, tensor in first.update.items()}
    for tensor in first.update.values():
        tensor.zero_()  # what a receiver does with its copy is its own business
    again = reply(ward.answer(request()))
    assert same(again.update, kept)
    again.update["0.bias"].zero_()
    third = reply(ward.fit(weights()))
    assert same(third.update, kept)
    assert same(third.state, {name: weights()[name] + kept[name] for name in kept})
    assert third.metrics.keys() == {"loss", "examples"}
    assert third.weight == 2.0
    assert ward.ledger.releases == 3


def test_a_folder_of_replies_outlives_the_process_and_needs_neither_data_nor_budget(tmp_path: Path) -> None:
    first = reply(client(ledger_file(tmp_path, 100.0), replies=tmp_path / "r").answer(request()))
    later = client(ledger_file(tmp_path), dataset=Untouched(), replies=tmp_path / "r")
    assert equal(reply(later.answer(request())), first)
    assert later.ledger.releases == 3


def test_another_request_under_the_same_number_is_trained_and_paid_for() -> None:
    ward = client(replies=ReplyStore(keep=9))
    moved = {**weights(), "0.bias": weights()["0.bias"] + 1e-9}
    asked = [request(), request(state=moved), request(steps=2), request(2), request(federation="b")]
    first = [reply(ward.answer(each)) for each in asked]
    assert ward.ledger.releases == 3 + 3 + 2 + 3 + 3
    assert all(equal(reply(ward.answer(each)), had) for each, had in zip(asked, first, strict=True))
    assert ward.ledger.releases == 14
    assert len({float(each.update["0.bias"][0]) for each in first}) == 5
    assert ward.spending(1e-5).rounds == {"federation": 2, "b": 1}


def test_under_a_seed_another_request_under_the_same_number_would_meet_the_same_noise(tmp_path: Path) -> None:
    moved = {**weights(), "0.bias": weights()["0.bias"] + 1}
    for ledger in (dpdl.Ledger(relation="add_or_remove"), ledger_file(tmp_path)):
        ward = client(ledger, insecure_seed=3)
        first = reply(ward.answer(request()))
        for bad in (request(state=moved), request(steps=2)):
            refusal = ward.answer(bad)
            assert isinstance(refusal, Refusal)
            assert (refusal.reason, "same noise" in refusal.message) == ("request", True)
        assert equal(reply(ward.answer(request())), first)
        assert ledger.releases == 3
        restarted = client(ledger, insecure_seed=3)  # its replies are gone; the same round again, to the bit
        assert same(reply(restarted.answer(request())).update, first.update)
        assert isinstance(restarted.answer(request(state=moved)), Refusal)
        assert ledger.releases == 3
        assert isinstance(client(ledger, insecure_seed=4).answer(request(state=moved)), FitReply)


@pytest.mark.parametrize("where", [None, "replies"])
def test_old_replies_are_dropped_and_their_rounds_never_trained_again(where: str | None, tmp_path: Path) -> None:
    ledger = dpdl.Ledger(relation="add_or_remove")
    store = ReplyStore(None if where is None else tmp_path / where, keep=2)
    ward = client(ledger, replies=store)
    had = {round: reply(ward.answer(request(round))) for round in (1, 2, 3)}
    other = reply(ward.answer(request(1, federation="b")))
    if where is not None:
        store = ReplyStore(tmp_path / where, keep=2)
        ward = client(ledger, replies=store)
    refusal = ward.answer(request(1))
    assert isinstance(refusal, Refusal)
    assert "no longer kept" in refusal.message
    assert equal(reply(ward.answer(request(2))), had[2])
    assert equal(reply(ward.answer(request(3))), had[3])
    assert equal(reply(ward.answer(request(1, federation="b"))), other)
    assert ledger.releases == 12
    reply(ward.answer(request(4)))
    assert isinstance(ward.answer(request(2)), Refusal)
    if where is not None:
        assert len(list((tmp_path / where).glob("*.reply"))) == 3


def test_a_damaged_reply_is_refused_and_the_next_round_goes_on(tmp_path: Path) -> None:
    ward = client(replies=tmp_path)
    reply(ward.answer(request()))
    (file,) = tmp_path.iterdir()
    for damage in (b"", b"nonsense", file.read_bytes()[:-100]):
        file.write_bytes(damage)
        refusal = ward.answer(request())
        assert isinstance(refusal, Refusal)
        assert str(tmp_path) not in refusal.message
        with pytest.raises(CheckpointError):
            ward.fit(weights())
    torch.save({"schema": "else", "reply": None}, file)
    assert isinstance(ward.answer(request()), Refusal)
    assert ward.ledger.releases == 3
    reply(ward.answer(request(2)))


def test_a_reply_that_cannot_be_kept_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ward = client(replies=tmp_path / "r")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        refusal = ward.answer(request())
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "failed"
    assert list((tmp_path / "r").iterdir()) == []
    assert ward.ledger.releases == 3  # spent: nobody knows that it was not seen
    ward.go_on(not_the_data="the disk was full")
    reply(ward.answer(request()))
    assert ward.ledger.releases == 6


def test_two_clients_may_share_a_folder(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path, keep=1)
    a, b = client(name="a", replies=store), client(name="b", replies=store)
    first, second = reply(a.answer(request())), reply(b.answer(request()))
    assert not same(first.update, second.update)
    assert equal(reply(a.answer(request())), first)
    assert equal(reply(b.answer(request())), second)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be kept"):
        ReplyStore(tmp_path / "file" / "in it")
    with pytest.raises(ParameterError, match="keep"):
        ReplyStore(keep=0)
