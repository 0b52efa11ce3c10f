"""Real clients and servers under the runner: the arithmetic, the accounting, and what outlives a process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset, TensorDataset

import accountants
from dpdl import Budget, LedgerFile
from dpdl.federated.client import DPClient
from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.federated.local_updates import LocalUpdateDP
from dpdl.federated.partition import iid
from dpdl.federated.plain_client import PlainClient
from dpdl.federated.runner import accuracy_on, run_federated
from dpdl.federated.server import FederatedServer
from dpdl.federated.virtual_clients import VirtualClients

DELTA = 1e-5
NOISE, RATE, STEPS = 1.0, 0.125, 8  # the setting of Flower's Opacus example
ROWS = torch.randn(240, 3, generator=torch.Generator().manual_seed(0))
LABELS = (ROWS[:, 0] > 0).long()
DATA = TensorDataset(ROWS, LABELS)
PARTS = iid(len(DATA), 3)


def model() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Linear(3, 2)


def record_level(name: str, part: Any, ledger: Any, **settings: Any) -> DPClient:
    given = {"noise_multiplier": NOISE, "max_grad_norm": 1.0, "sample_rate": RATE, "steps": STEPS} | settings
    sgd = partial(torch.optim.SGD, lr=0.5)
    return DPClient(name, model, Subset(DATA, part), F.cross_entropy, optimizer=sgd, ledger=ledger, **given)


def plain(name: str, part: Any, **settings: Any) -> PlainClient:
    sgd = partial(torch.optim.SGD, lr=0.5)
    given = {"batch_size": 20, "steps": 2} | settings
    return PlainClient(name, model, Subset(DATA, part), F.cross_entropy, optimizer=sgd, **given)


def expected_epsilon(steps: int) -> float:
    return accountants.epsilon(noise_multiplier=NOISE, sample_rate=RATE, steps=steps, delta=DELTA)


def test_one_full_batch_step_a_round_is_gradient_descent_on_everything() -> None:
    clients = [plain(f"c{k}", part, batch_size=len(part), steps=1) for k, part in enumerate(PARTS)]
    run = run_federated(FederatedServer(model()), clients, rounds=4, progress=False)
    oracle = model()
    for _ in range(4):
        oracle.zero_grad()
        F.cross_entropy(oracle(ROWS), LABELS).backward()
        with torch.no_grad():
            for parameter in oracle.parameters():
                parameter -= 0.5 * parameter.grad
    for name, expected in oracle.state_dict().items():
        torch.testing.assert_close(run.state[name], expected)
        assert not torch.allclose(run.state[name], model().state_dict()[name], atol=1e-2)


@pytest.mark.parametrize("rounds", [3, 10, 100])
def test_epsilon_after_many_rounds_is_that_of_all_their_steps(rounds: int, tmp_path: Path) -> None:
    client = record_level("a", PARTS[0], LedgerFile(tmp_path / "a.ledger"))
    run = run_federated(FederatedServer(model()), [client], rounds=rounds, every=rounds, progress=False)
    reported = (run.history.rounds[-1].client_epsilon or {})["a"]
    assert reported == pytest.approx(expected_epsilon(rounds * STEPS), rel=1e-6)
    assert reported > 1.3 * expected_epsilon(STEPS)  # which a new accountant in each round would say
    claims = [claim.epsilon for claim in run.report.claims if claim.unit == "record"]
    assert claims == [pytest.approx(reported, rel=1e-6)] * 3


def test_a_client_whose_budget_ends_refuses_and_the_others_go_on(tmp_path: Path) -> None:
    budget = Budget(epsilon=expected_epsilon(2 * STEPS) + 0.01, delta=DELTA)
    poor = record_level("poor", PARTS[0], LedgerFile(tmp_path / "poor.ledger", budget=budget))
    rich = record_level("rich", PARTS[1], LedgerFile(tmp_path / "rich.ledger"))
    run = run_federated(FederatedServer(model()), [poor, rich], rounds=4, progress=False)
    assert [r.answered for r in run.history.rounds] == [("poor", "rich")] * 2 + [("rich",)] * 2
    assert [dict(r.refused) for r in run.history.rounds] == [{}, {}, {"budget": ("poor",)}, {"budget": ("poor",)}]
    assert [number for number, _ in run.history.of_client("poor")] == [1, 2, 3, 4]
    assert run.history.of_client("poor")[-1][1] <= budget.epsilon
    assert run.history.of_client("rich")[-1][1] == pytest.approx(expected_epsilon(4 * STEPS), rel=1e-6)


def test_a_second_federation_on_the_same_ledgers_adds_up(tmp_path: Path) -> None:
    for federation in ("first", "second"):
        client = record_level("a", PARTS[0], LedgerFile(tmp_path / "a.ledger"))
        server = FederatedServer(model(), federation=federation)
        run = run_federated(server, [client], rounds=2, progress=False)
    assert (run.history.rounds[-1].client_epsilon or {})["a"] == pytest.approx(expected_epsilon(4 * STEPS), rel=1e-6)


def test_clients_that_are_let_go_and_made_again_forget_nothing(tmp_path: Path) -> None:
    made: list[str] = []

    def make(index: int, _: int) -> DPClient:
        made.append(f"client-{index}")
        return record_level(made[-1], PARTS[index], LedgerFile(tmp_path / f"{index}.ledger"))

    clients = VirtualClients(make, 3, keep=1)
    run = run_federated(FederatedServer(model()), clients, rounds=3, progress=False)
    assert made.count("client-0") >= 3
    for epsilon in (run.history.rounds[-1].client_epsilon or {}).values():
        assert epsilon == pytest.approx(expected_epsilon(3 * STEPS), rel=1e-6)


def test_server_noise_is_accounted_by_round_and_ends_with_the_plan() -> None:
    plan = ClientLevelPlan(clients=3, rounds=3, sampling="all", noise_multiplier=4.0, max_update_norm=0.5)
    clients = [plain(f"c{k}", part) for k, part in enumerate(PARTS)]
    run = run_federated(FederatedServer(model(), plan=plan), clients, rounds=5, progress=False)
    assert "3 rounds are taken" in str(run.stopped)
    by_round = [accountants.epsilon(noise_multiplier=4.0, sample_rate=1.0, steps=t, delta=DELTA) for t in (1, 2, 3)]
    assert [r.server_epsilon for r in run.history.rounds] == pytest.approx(by_round, rel=1e-6)
    assert not run.history.secret_participation
    assert [claim.guaranteed for claim in run.report.against("server")] == [False] * len(run.report.against("server"))
    assert any(claim.guaranteed for claim in run.report.against("model consumers"))


def test_drawn_clients_are_a_secret(tmp_path: Path) -> None:
    plan = ClientLevelPlan(clients=3, rounds=3, sample_rate=0.5, noise_multiplier=4.0, max_update_norm=0.5)
    clients = [plain(f"c{k}", part) for k, part in enumerate(PARTS)]
    server = FederatedServer(model(), plan=plan, insecure_seed=1)
    run = run_federated(server, clients, rounds=3, progress=False)
    assert run.history.secret_participation
    assert {len(r.chosen) for r in run.history.rounds} - {3}
    assert "c0" not in run.history.public().to_json()


def test_noise_on_updates_is_the_clients_own_spending(tmp_path: Path) -> None:
    clients = [
        LocalUpdateDP(
            plain(f"c{k}", part),
            max_update_norm=1.0,
            noise_multiplier=6.0,
            ledger=LedgerFile(tmp_path / f"{k}.ledger", relation="replace_one"),
        )
        for k, part in enumerate(PARTS)
    ]
    run = run_federated(FederatedServer(model()), clients, rounds=2, progress=False)
    # of norm 2 S, so that the noise multiplier counts by half
    expected = accountants.epsilon(noise_multiplier=3.0, sample_rate=1.0, steps=2, delta=DELTA)
    for epsilon in (run.history.rounds[-1].client_epsilon or {}).values():
        assert epsilon == pytest.approx(expected, rel=1e-6)


def test_a_seeded_run_repeats_itself_and_a_secure_one_does_not(tmp_path: Path) -> None:
    def weights(folder: str, seed: int | None) -> torch.Tensor:
        (tmp_path / folder).mkdir()
        clients = [
            record_level(f"c{k}", part, LedgerFile(tmp_path / folder / f"{k}.ledger"), insecure_seed=seed)
            for k, part in enumerate(PARTS)
        ]
        run = run_federated(FederatedServer(model(), insecure_seed=seed), clients, rounds=2, progress=False)
        return run.state["weight"]

    assert torch.equal(weights("a", 5), weights("b", 5))
    assert not torch.equal(weights("c", 6), weights("d", 5))
    assert not torch.equal(weights("e", None), weights("f", None))


def test_it_learns() -> None:
    clients = [plain(f"c{k}", part, steps=6) for k, part in enumerate(PARTS)]
    run = run_federated(
        FederatedServer(model()), clients, rounds=3, evaluate=accuracy_on(model(), ROWS, LABELS), progress=False
    )
    assert run.history.last_evaluation == {"accuracy": pytest.approx(1.0, abs=0.1)}
    assert accuracy_on(model(), ROWS, LABELS)(model().state_dict())["accuracy"] < 0.85  # type: ignore[index]
