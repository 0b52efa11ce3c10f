"""Whatever is given in place of an argument: one error of ours that names it, before anything is spent or made."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import dpdl
from accountants import NeighboringRelation
from dpdl.errors import ParameterError, PrivacyError
from dpdl.federated import (
    DPClient,
    FederatedServer,
    FitReply,
    FitRequest,
    Inventory,
    LocalUpdateDP,
    PlainClient,
    PrivateMoments,
    ReplyStore,
    federated_report,
)

ODD: tuple[Any, ...] = (-1, 1.5, math.nan, math.inf, "x", [1], {"a": 1}, object())
DATA = TensorDataset(torch.zeros(40, 4), torch.zeros(40, dtype=torch.int64))
SGD = functools.partial(torch.optim.SGD, lr=0.1)


def plain(**changed: Any) -> PlainClient:
    return PlainClient("p", nn.Linear(4, 2), DATA, F.cross_entropy, optimizer=SGD, batch_size=5, steps=1, **changed)


def private(folder: Path, **changed: Any) -> DPClient:
    settings: dict[str, Any] = {"optimizer": SGD, "noise_multiplier": 1.0, "max_grad_norm": 1.0, "batch_size": 10}
    settings |= {"loss_fn": F.cross_entropy, "steps": 1, "ledger": folder / "c.ledger", **changed}
    return DPClient("c", nn.Linear(4, 2), DATA, **settings)


def local(folder: Path, **changed: Any) -> LocalUpdateDP:
    settings: dict[str, Any] = {"client": plain(), "max_update_norm": 1.0, "noise_multiplier": 1.0}
    return LocalUpdateDP(**{**settings, "ledger": dpdl.Ledger(relation=NeighboringRelation.REPLACE_ONE), **changed})


def moments(folder: Path, **changed: Any) -> PrivateMoments:
    settings: dict[str, Any] = {"name": "m", "features": torch.zeros(3, 1), "lower": [0.0], "upper": [1.0]}
    settings |= {"noise_multiplier": 1.0, "ledger": folder / "m.ledger", **changed}
    return PrivateMoments(**settings)


MADE: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "optimizer": (private, ODD),
    "loss_fn": (private, ODD),
    "train": (private, ODD),
    "execution": (private, ODD),
    "send_buffers": (private, ("no", 1, None)),
    "may_stop_early": (private, ("no", 1, None)),
    "metrics": (private, ODD),
    "replies": (private, (-1, 1.5, [1], object())),
    "client": (local, ODD),
    "lower": (moments, (None, *ODD[:5], ODD[-1])),
    "upper": (moments, (None, *ODD[:5], ODD[-1])),
    "features": (moments, (None, 1, 1.5, "x", object())),
    "kept": (moments, (-1, 1.5, [1], object())),
    "federation": (moments, (None, 1, "", "a\nb", "\x1b[31m")),
    "name": (moments, (None, 1, "", "a\nb", "\x1b[31m")),
}


@pytest.mark.parametrize("argument", MADE)
def test_no_odd_argument_gets_through(argument: str, tmp_path: Path) -> None:
    make, values = MADE[argument]
    for value in values:
        with pytest.raises(PrivacyError) as refused:
            make(tmp_path, **{argument: value})
        assert argument in str(refused.value) or argument in ("client", "replies", "lower", "upper", "execution")
    make(tmp_path)  # as it is, it is fine


@pytest.mark.parametrize("value", [*ODD, None])
def test_what_is_no_ledger_is_refused(value: object, tmp_path: Path) -> None:
    if value == "x":
        return  # a path
    for make in (private, local, moments):
        with pytest.raises(PrivacyError, match="ledger"):
            make(tmp_path, ledger=value)


@pytest.mark.parametrize("value", [-1, 0, 1.5, math.nan, "x", True])
def test_a_round_is_not_asked_for_in_such_steps(value: Any) -> None:
    server = FederatedServer(nn.Linear(4, 2))
    server.open_round(["p"])
    with pytest.raises(ParameterError, match="steps"):
        server.request(steps=value)
    assert server.request(steps=3).steps == 3  # the round is still open


@pytest.mark.parametrize("value", [None, "", "a\nb", "\x1b[2J", 3])
def test_a_federation_has_a_printable_name(value: Any) -> None:
    with pytest.raises(ParameterError, match="federation"):
        FederatedServer(nn.Linear(4, 2), federation=value)


@pytest.mark.parametrize("value", [3, 1.5, "weight", object()])
def test_trained_are_names(value: Any) -> None:
    with pytest.raises(ParameterError, match="trained"):
        FederatedServer(nn.Linear(4, 2).state_dict(), trained=value)


def test_what_is_no_request_is_told_to_whoever_asks(tmp_path: Path) -> None:
    for client in (private(tmp_path), plain(), local(tmp_path)):
        for odd in (*ODD, None):
            with pytest.raises(ParameterError, match="FitRequest"):
                client.answer(odd)


def test_a_report_is_of_clients_and_a_server(tmp_path: Path) -> None:
    for odd in ODD:
        with pytest.raises(ParameterError, match="server"):
            federated_report(server=odd, clients=[plain()], delta=1e-5)
        with pytest.raises(ParameterError, match="clients"):
            federated_report(server=None, clients=odd, delta=1e-5)
        with pytest.raises(ParameterError, match="inventories"):
            federated_report(server=None, clients=[plain()], delta=1e-5, inventories={"p": odd})
    federated_report(server=None, clients=[plain()], delta=1e-5, inventories={"p": [Inventory()]})


def test_replies_are_kept_in_a_folder() -> None:
    for odd in (3, 1.5, [1], object()):
        with pytest.raises(ParameterError, match="folder"):
            ReplyStore(odd)  # type: ignore[arg-type]


def test_weights_that_are_no_numbers_spend_nothing(tmp_path: Path) -> None:
    client = private(tmp_path)
    for value in (math.nan, math.inf, -math.inf, 1e30):
        state = {name: torch.full_like(tensor, value) for name, tensor in nn.Linear(4, 2).state_dict().items()}
        answer = client.answer(FitRequest(round=1, state=state))
        assert not isinstance(answer, FitReply)
        assert answer.reason == "request"
    assert client.ledger.releases == 0
    assert client.unanswered.new == 0


def test_a_ledger_that_cannot_be_written_refuses_the_round_before_data_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    touched: list[int] = []

    class Watched(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            touched.append(index)
            return super().__getitem__(index)

    client = private(tmp_path)
    client = DPClient(
        "c",
        nn.Linear(4, 2),
        Watched(*DATA.tensors),
        F.cross_entropy,
        optimizer=SGD,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        batch_size=10,
        steps=1,
        ledger=client.ledger,
    )
    request = FitRequest(round=1, state=nn.Linear(4, 2).state_dict())
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        answer = client.answer(request)
    assert not isinstance(answer, FitReply)
    assert answer.reason == "request"
    assert str(tmp_path) not in answer.message  # paths are the client's own business
    assert not touched
    assert isinstance(client.answer(request), FitReply)  # once there is room
    assert touched
