"""Private normalisation statistics over Flower's messages: the same numbers, released once, refused without a word."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import Tensor, nn

from accountants import Gaussian, NeighboringRelation, PRVAccountant
from dpdl.budget import Budget
from dpdl.errors import ChannelError, ParameterError
from dpdl.federated.flower import DPStrategy, ask_moments, client_app, ledger_path, partition
from dpdl.federated.messages import Client, Refusal
from dpdl.federated.noisy_moments import NoisyMoments
from dpdl.federated.normalisation import combined_moments
from dpdl.federated.private_moments import PrivateMoments
from dpdl.federated.server import FederatedServer
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from tests.federated.flower.grid import OneProcess, context
from tests.federated.flower.task import ledger_of, make_client

NOISE, BOUNDS = 8.0, {"lower": [-10.0] * 4, "upper": [10.0] * 4}


def features(index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return 2 + 3 * torch.randn(400, 4, generator=generator)


class Moments:
    """What a node releases; tests change its features, or how it is kept."""

    def __init__(self, **more: Any) -> None:
        self.more = more
        self.rows = features

    def __call__(self, context: Context) -> PrivateMoments:
        index, _ = partition(context)
        path = ledger_path(context)
        settings: dict[str, Any] = {"ledger": path, "kept": path.with_suffix(".moments"), **BOUNDS, **self.more}
        return PrivateMoments(f"client-{index}", self.rows(index), noise_multiplier=NOISE, **settings)


def client(context: Context) -> Client:
    return make_client(*partition(context), ledger=ledger_path(context))


def grid_of(folder: Path, moments: Any, number: int = 4) -> OneProcess:
    nodes = [context(index, number, **{"ledger-folder": str(folder)}) for index in range(number)]
    return OneProcess(client_app(client, make_moments=moments), nodes)


def told(answers: dict[str, NoisyMoments | Refusal]) -> Iterator[NoisyMoments]:
    return (answer for answer in answers.values() if isinstance(answer, NoisyMoments))


def test_the_moments_are_those_of_one_process_and_are_paid_for_once(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, Moments(insecure_seed=7))
    first = ask_moments(grid, clients=4)
    here = [
        PrivateMoments(
            f"client-{index}",
            features(index),
            noise_multiplier=NOISE,
            ledger=LedgerFile(tmp_path / f"here-{index}.ledger"),
            insecure_seed=7,
            lower=BOUNDS["lower"],
            upper=BOUNDS["upper"],
        ).release()
        for index in range(4)
    ]
    assert list(first.values()) == here
    for _ in range(3):  # each time in an object of its own, as in a process of its own
        assert ask_moments(grid, clients=4) == first
    once = PRVAccountant().compose(Gaussian(NOISE)).epsilon(1e-5)
    for index in range(4):
        assert LedgerFile(ledger_of(tmp_path, index)).releases == 1
        assert LedgerFile(ledger_of(tmp_path, index)).epsilon(1e-5) == pytest.approx(once)


def test_secure_moments_that_are_asked_for_again_are_the_same(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, Moments())
    assert ask_moments(grid) == ask_moments(grid)
    (tmp_path / "client-0.moments").unlink()
    again = ask_moments(grid)
    assert LedgerFile(ledger_of(tmp_path, 0)).releases == 2  # another release, and paid for
    assert LedgerFile(ledger_of(tmp_path, 1)).releases == 1
    assert len(again) == 4


class Standardised(nn.Module):
    """The result goes to the clients as buffers: with the weights, in each request."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.linear = nn.Linear(len(mean), 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear((x - self.mean) / self.std)
        return logits


def test_statistics_first_and_then_rounds_with_them_in_one_ledger(tmp_path: Path) -> None:
    seen = []

    def client(context: Context) -> Client:
        made = make_client(*partition(context), ledger=ledger_path(context), train=train)
        made._make_model = lambda: Standardised((0.0,) * 4, (1.0,) * 4)
        return made

    def train(model: Any, optimizer: Any, loader: Any, steps: int) -> dict[str, float]:
        state = model.state_dict()
        seen.append((state["mean"].clone(), state["std"].clone()))
        for _, (x, y) in zip(range(steps), loader, strict=False):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return {}

    grid = grid_of(tmp_path, Moments())
    grid.app = client_app(client, make_moments=Moments())
    found = combined_moments(told(ask_moments(grid, clients=4)))
    assert all(math.isclose(mean, 2.0, abs_tol=0.6) for mean in found.mean)
    server = FederatedServer(Standardised(found.mean, found.std))
    DPStrategy(server, clients=4, steps=4).start(grid, num_rounds=1)
    assert len(seen) == 4
    for mean, std in seen:
        assert torch.equal(mean, torch.tensor(found.mean))
        assert torch.equal(std, torch.tensor(found.std))
    assert torch.equal(server.state["mean"], torch.tensor(found.mean))
    assert LedgerFile(ledger_of(tmp_path, 0)).releases == 1 + 4


def test_a_client_whose_values_are_not_finite_says_nothing_and_goes_no_further(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moments = Moments()
    moments.rows = lambda index: features(index) if index != 2 else torch.full((3, 4), math.nan)
    answers = ask_moments(grid_of(tmp_path, moments), clients=4)
    refusal = answers["client-2"]
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.message) == ("failed", "DataError, see the node's own log")
    assert len(list(told(answers))) == 3
    assert "not finite" in caplog.text  # at the node
    broken = make_client(2, 4, ledger=ledger_of(tmp_path, 2))
    assert broken.unanswered.new == 1
    assert not any(claim.guaranteed for claim in broken.report(1e-5).claims)
    assert LedgerFile(ledger_of(tmp_path, 2)).releases == 0
    moments.rows = features
    again = ask_moments(grid_of(tmp_path, moments))["client-2"]
    assert isinstance(again, Refusal)  # until its owner has looked
    assert again.reason == "request"
    broken.go_on(not_the_data="a broken thermometer")
    assert isinstance(ask_moments(grid_of(tmp_path, moments))["client-2"], NoisyMoments)


def test_a_spent_budget_refuses_and_ends_no_claim(tmp_path: Path) -> None:
    LedgerFile(ledger_of(tmp_path, 1), budget=Budget(epsilon=0.01, delta=1e-5))
    refusal = ask_moments(grid_of(tmp_path, Moments()))["client-1"]
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "budget"
    assert make_client(1, 4, ledger=ledger_of(tmp_path, 1)).unanswered.new == 0


@pytest.mark.parametrize("more", [{"kept": None}, {"ledger": Ledger(relation=NeighboringRelation.ADD_OR_REMOVE)}])
def test_moments_that_would_be_forgotten_are_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    answers = ask_moments(grid_of(tmp_path, Moments(**more)))
    assert {answer.reason for answer in answers.values() if isinstance(answer, Refusal)} == {"request"}
    assert len(answers) == 4


def test_other_apps_other_names_and_garbage_are_failures(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, Moments())
    grid.app = client_app(client)
    without = ask_moments(grid)
    assert {answer.message for answer in without.values() if isinstance(answer, Refusal)} == {
        "this client releases no moments"
    }
    assert len(without) == 4
    honest = client_app(client, make_moments=Moments())
    lies = iter([b"{", b"[]", json.dumps({"schema": "dpdl.moments/1"}).encode(), None])

    def liar(message: Message, context: Context) -> Message:
        answer = honest(message, context)
        if message.metadata.message_type != "query.dpdl_moments":
            return answer
        lie = next(lies)
        record = ConfigRecord({} if lie is None else {"json": lie.decode()})
        return Message(RecordDict({"dpdl.moments": record}), reply_to=message)

    garbage = ask_moments(OneProcess(liar, grid.contexts.values()))
    assert {answer.reason for answer in garbage.values() if isinstance(answer, Refusal)} == {"failed"}
    assert len(garbage) == 4

    def impostor(context: Context) -> PrivateMoments:
        return PrivateMoments(
            "client-9",
            features(0),
            noise_multiplier=NOISE,
            ledger=tmp_path / f"{context.node_id}.ledger",
            kept=tmp_path / f"{context.node_id}.moments",
            lower=BOUNDS["lower"],
            upper=BOUNDS["upper"],
        )

    named = ask_moments(grid_of(tmp_path, impostor))["client-0"]
    assert isinstance(named, Refusal)
    assert named.message == "it answered as 'client-9'"


def test_what_is_kept_is_of_these_settings_or_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"noise_multiplier": NOISE, "ledger": tmp_path / "l", "kept": tmp_path / "m", **BOUNDS}
    first = PrivateMoments("h", features(0), **settings).release()
    same = PrivateMoments("h", features(1), **settings)  # whatever the data is now
    assert same.released == first
    assert same.release() == first
    changed: dict[str, Any]
    for changed in ({"noise_multiplier": 9.0}, {"lower": [-9.0] * 4}, {"federation": "other"}):
        with pytest.raises(ParameterError, match="another release"):
            PrivateMoments("h", features(0), **{**settings, **changed})
    with pytest.raises(ParameterError, match="another release"):
        PrivateMoments("g", features(0), **settings)
    assert LedgerFile(tmp_path / "l").releases == 1


def test_bad_arguments_are_said(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, Moments())
    for changes in ({"clients": 0}, {"timeout": 0.0}, {"patience": -1.0}, {"timeout": math.nan}):
        with pytest.raises(ParameterError):
            ask_moments(grid, **changes)
    with pytest.raises(ChannelError, match="4 clients"):
        ask_moments(grid, clients=5, patience=0.1)
