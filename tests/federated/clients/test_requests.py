"""Requests and models that will not do: one clear refusal, nothing spent, nothing changed, the next round goes on."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dpdl
from dpdl.errors import ExampleMixingError, ModelError, ParameterError
from dpdl.federated.client import DPClient
from dpdl.federated.local_updates import LocalUpdateDP
from dpdl.federated.messages import FitReply, FitRequest, Refusal
from dpdl.federated.plain_client import PlainClient
from dpdl.ledger_file import LedgerFile
from tests.federated.clients.worlds import N, Untouched, client, network, records, request, same, sgd, weights


def changed(name: str, tensor: Any) -> dict[str, Any]:
    return {**weights(), name: tensor}


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights().items() if key != name}


WRONG: dict[str, tuple[FitRequest, str]] = {
    "missing": (request(state=without("0.bias")), "lacks '0.bias'"),
    "empty": (request(state={}), "lacks '0.weight', '0.bias'"),
    "unknown": (request(state=changed("3.weight", torch.zeros(2))), "'3.weight'"),
    "shape": (request(state=changed("0.bias", torch.zeros(5).double())), r"'0.bias'.*shape \(5,\).*shape \(4,\)"),
    "scalar": (request(state=changed("0.bias", torch.tensor(1.0).double())), "'0.bias'"),
    "dtype": (request(state=changed("0.bias", torch.zeros(4))), "'0.bias'.*float32.*float64"),
    "integers": (request(state=changed("0.bias", torch.zeros(4, dtype=torch.int64))), "int64"),
    "nan": (request(state=changed("2.bias", torch.tensor([0.0, math.nan]).double())), "'2.bias'.*NaN"),
    "huge": (request(state=changed("2.bias", torch.tensor([-2e9, 0.0]).double())), "beyond 1e\\+09"),
    "infinite": (request(state=changed("2.bias", torch.tensor([-math.inf, 0.0]).double())), "infinite"),
    "list": (request(state=changed("2.bias", [0.0, 0.0])), "'2.bias'.*no dense tensor"),
    "sparse": (request(state=changed("2.bias", torch.zeros(2).double().to_sparse())), "no dense tensor"),
    "meta": (request(state=changed("2.bias", torch.zeros(2, device="meta").double())), "no dense tensor"),
    "not a mapping": (request(state=[1.0]), "mapping"),  # type: ignore[arg-type]
    "steps": (request(steps=0), "steps"),
    "steps of another kind": (request(steps="3"), "steps"),  # type: ignore[arg-type]
    "true steps": (request(steps=True), "steps"),
    "round": (request(0), "round"),
    "round of another kind": (request(1.0), "round"),  # type: ignore[arg-type]
    "too many steps": (request(steps=10_001), "at most 10000"),
    "federation": (request(federation=""), "federation"),
    "federation of two lines": (request(federation="a\nb"), "federation"),
    "federation of another kind": (request(federation=None), "federation"),  # type: ignore[arg-type]
}


def test_each_bad_request_is_refused_once_and_spends_nothing() -> None:
    ledger = dpdl.Ledger(relation="add_or_remove")
    ward = client(ledger, insecure_seed=8)
    unread = client(ledger, dataset=Untouched())
    plain = PlainClient(
        "plain", network, Untouched(), nn.functional.cross_entropy, optimizer=sgd(), batch_size=4, steps=3
    )
    for what, (bad, said) in WRONG.items():
        for asked in (ward, unread, plain):
            refusal = asked.answer(bad)
            assert isinstance(refusal, Refusal), what
            assert refusal.reason == "request", (what, refusal)
            assert re.search(said, refusal.message), (what, refusal.message)
        with pytest.raises(ParameterError):
            ward.fit(bad.state, steps=bad.steps, round=bad.round, federation=bad.federation)
    assert ledger.releases == 0
    after = ward.answer(request())
    expected = client(insecure_seed=8).answer(request())
    assert isinstance(after, FitReply)
    assert isinstance(expected, FitReply)
    assert same(after.update, expected.update)


def test_nobody_saying_how_many_steps_is_refused() -> None:
    refusal = client(steps=None).answer(request())
    assert isinstance(refusal, Refusal)
    assert "local steps" in refusal.message
    assert isinstance(client(steps=None).answer(request(steps=2)), FitReply)


class Averaging(nn.Module):
    """Hands examples their neighbours' mean, which no list of classes knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x - x.mean(0))
        return found


def test_batch_normalisation_is_refused_with_reason_and_remedy_before_data_is_touched() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()

    ledger = dpdl.Ledger(relation="add_or_remove")
    ward = client(ledger, model=model, dataset=Untouched())
    asked = request(state=model().state_dict())
    for _ in range(2):
        refusal = ward.answer(asked)
        assert isinstance(refusal, Refusal)
        assert refusal.reason == "request"
        for part in ("'1'", "BatchNorm1d", "mixes examples", "GroupNorm", "dpdl.fix"):
            assert part in refusal.message
    with pytest.raises(ExampleMixingError):
        ward.fit(asked.state)
    assert ledger.releases == 0


def test_a_model_that_will_not_do_is_refused_each_time_for_the_same_reason() -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2).double()
            self.register_buffer("flag", torch.tensor(True))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.inner(x)
            return found

    batch_norm = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    for model, said in ((batch_norm, "BatchNorm1d"), (Flagged(), "of bool")):
        ward = client(model=model, dataset=Untouched(), send_buffers=True)
        for _ in range(2):
            refusal = ward.answer(request(state=model.state_dict()))
            assert isinstance(refusal, Refusal)
            assert (refusal.reason, said in refusal.message) == ("request", True)


def test_other_mixing_is_found_on_the_first_batch_which_is_a_failure_like_others(tmp_path: Any) -> None:
    ledger = dpdl.LedgerFile(tmp_path / "l")
    refusal = client(ledger, model=Averaging).answer(request(state=Averaging().state_dict()))
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "failed"
    assert "mixes examples" not in refusal.message
    assert ledger.releases == 3


def test_a_frozen_batch_normalisation_takes_the_servers_statistics() -> None:
    def model() -> nn.Module:
        frozen = nn.BatchNorm1d(4).requires_grad_(False).eval()
        return nn.Sequential(nn.Linear(3, 4), frozen, nn.Linear(4, 2)).double()

    state = {name: tensor.clone() for name, tensor in model().state_dict().items()}
    moved = {**state, "1.running_mean": state["1.running_mean"] + 3}
    ward = client(model=model, insecure_seed=1)
    first, other = ward.answer(request(1, state)), ward.answer(request(2, moved))
    assert isinstance(first, FitReply)
    assert isinstance(other, FitReply)
    assert first.update.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    # What need not be sent: frozen parameters and buffers are the model's own again.
    trained = {name: state[name] for name in first.update}
    again = ward.answer(request(1, trained, federation="b"))
    plain = client(model=model, insecure_seed=1).answer(request(1, state, federation="b"))
    moved_again = client(model=model, insecure_seed=1).answer(request(1, moved, federation="b"))
    assert isinstance(again, FitReply)
    assert isinstance(plain, FitReply)
    assert isinstance(moved_again, FitReply)
    assert all(torch.equal(again.update[name], plain.update[name]) for name in trained)
    assert not same(again.update, moved_again.update)


def test_a_buffer_may_be_infinite_where_the_models_own_is() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2).double()
            self.register_buffer("mask", torch.tensor([0.0, 0.0, -math.inf]).double())

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.inner(x * torch.softmax(self.mask, 0))
            return found

    state = Masked().state_dict()
    assert isinstance(client(model=Masked).answer(request(state=state)), FitReply)
    refusal = client(model=Masked).answer(
        request(state={**state, "mask": torch.tensor([-math.inf, 0.0, 0.0]).double()})
    )
    assert isinstance(refusal, Refusal)
    assert "'mask'" in refusal.message


def test_tied_parameters_come_under_one_name_and_may_not_differ() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3).double()
            self.b = nn.Linear(3, 3).double()
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.b(torch.tanh(self.a(x)))
            return found

    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    ward = client(model=Tied, insecure_seed=1)
    answer = ward.answer(request(1, state))
    assert isinstance(answer, FitReply)
    assert set(answer.update) == {"a.weight", "a.bias", "b.bias"}
    assert torch.equal(answer.state["b.weight"], answer.state["a.weight"])
    assert not torch.equal(answer.state["b.weight"], state["b.weight"])
    assert isinstance(ward.answer(request(2, answer.state)), FitReply)
    stale = {**answer.state, "b.weight": state["b.weight"]}
    refusal = ward.answer(request(3, stale))
    assert isinstance(refusal, Refusal)
    assert "without 'b.weight'" in refusal.message
    once = {name: tensor for name, tensor in answer.state.items() if name != "b.weight"}
    assert isinstance(ward.answer(request(3, once)), FitReply)


def test_a_tied_parameter_is_the_same_under_each_name_in_a_wrapped_and_in_a_kept_reply(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3).double()
            self.b = nn.Linear(3, 3).double()
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.b(torch.tanh(self.a(x)))
            return found

    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    ward = client(model=Tied, replies=tmp_path / "replies", ledger=LedgerFile(tmp_path / "ward.ledger"))
    updates = LedgerFile(tmp_path / "updates.ledger", relation="replace_one")
    wrapped = LocalUpdateDP(ward, max_update_norm=1.0, noise_multiplier=1.0, ledger=updates)
    again = client(model=Tied, replies=tmp_path / "replies", ledger=LedgerFile(tmp_path / "ward.ledger"))
    for answer in (wrapped.answer(request(1, state)), again.answer(request(1, state))):
        assert isinstance(answer, FitReply)
        assert torch.equal(answer.state["b.weight"], answer.state["a.weight"])
        assert not torch.equal(answer.state["b.weight"], state["b.weight"])


def test_errors_while_training_do_not_tell_of_the_data() -> None:
    def losing(output: Tensor, target: Tensor) -> Tensor:
        raise ValueError(f"patient {target.tolist()}")

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")

    for loss in (losing, summed):  # the second is found out by the check of the loss, which names the batch's size
        refusal = client(loss_fn=loss).answer(request())
        assert isinstance(refusal, Refusal)
        assert refusal.reason == "failed"
        assert not any(character.isdigit() for character in refusal.message)


def test_weights_that_training_makes_infinite_are_not_sent() -> None:
    refusal = client(optimizer=sgd(lr=1e300), steps=6, noise_multiplier=1e10).answer(request())
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "failed"


def test_what_no_model_can_be_made_of_is_refused() -> None:
    with pytest.raises(ModelError, match="function that makes one"):
        DPClient(
            "ward",
            3,  # type: ignore[arg-type]
            TensorDataset(*records()),
            nn.functional.cross_entropy,
            optimizer=sgd(),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            batch_size=N,
            ledger=dpdl.Ledger(relation="add_or_remove"),
        )
    frozen = network().requires_grad_(False)
    refusal = client(model=frozen, dataset=Untouched()).answer(request())
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "request"
