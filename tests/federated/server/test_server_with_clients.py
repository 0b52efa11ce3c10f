"""The server with real clients: FedAvg is gradient descent, a client without budget is counted, a run learns."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpdl.budget import Budget
from dpdl.federated.client import DPClient
from dpdl.federated.messages import Client
from dpdl.federated.plain_client import PlainClient
from dpdl.federated.server import FederatedServer
from dpdl.ledger_file import LedgerFile
from tests.federated.server.small_federation import norm_of, plan

EXAMPLES = 24
TRUE = torch.tensor([[1.0, -2.0, 0.5]])


def data(seed: int) -> TensorDataset:
    inputs = torch.randn(EXAMPLES, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs @ TRUE.T)


def net() -> nn.Module:
    module = nn.Linear(3, 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def sgd(rate: float) -> functools.partial[torch.optim.SGD]:
    return functools.partial(torch.optim.SGD, lr=rate)


def plain(count: int) -> list[Client]:
    return [
        PlainClient(
            f"client-{i}", net, data(i), nn.functional.mse_loss, optimizer=sgd(0.1), batch_size=EXAMPLES, steps=1
        )
        for i in range(count)
    ]


def play(server: FederatedServer, clients: list[Client], rounds: int) -> None:
    by_name = {client.name: client for client in clients}
    for _ in range(rounds):
        chosen = server.open_round(list(by_name))
        request = server.request()
        for name in chosen:
            server.add(by_name[name].answer(request))
        server.close_round()


def descended(steps: int, count: int) -> dict[str, Tensor]:
    """Gradient descent on everybody's examples together, with plain autograd."""
    module = net()
    inputs, targets = (torch.cat([data(i).tensors[k] for i in range(count)]) for k in (0, 1))
    for _ in range(steps):
        module.zero_grad()
        nn.functional.mse_loss(module(inputs), targets).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
    return dict(module.state_dict())


def test_fedavg_of_one_full_step_each_is_gradient_descent_on_all_data() -> None:
    server = FederatedServer(net())
    play(server, plain(4), rounds=3)
    expected = descended(3, 4)
    assert all(torch.allclose(tensor, expected[name], atol=1e-5) for name, tensor in server.state.items())


def test_a_plan_without_noise_and_with_a_wide_norm_is_the_same() -> None:
    server = FederatedServer(net(), plan=plan(clients=4, max_update_norm=1e6))
    play(server, plain(4), rounds=3)
    expected = descended(3, 4)
    assert all(torch.allclose(tensor, expected[name], atol=1e-5) for name, tensor in server.state.items())


def test_it_learns_under_client_level_noise() -> None:
    count = 10
    its_plan = plan(clients=count, rounds=15, noise_multiplier=1.0, max_update_norm=0.3)
    server = FederatedServer(net(), plan=its_plan, insecure_seed=1)
    play(server, plain(count), rounds=15)
    off = norm_of({"weight": server.state["weight"] - TRUE})
    assert off < 0.5 < norm_of({"weight": TRUE}) - 1
    assert server.epsilon(1e-5) == its_plan.epsilon(1e-5)


def test_a_client_whose_budget_is_spent_is_counted_and_changes_neither_noise_nor_claim(tmp_path: Path) -> None:
    clients: list[Client] = [
        DPClient(
            f"client-{i}",
            net,
            data(i),
            nn.functional.mse_loss,
            optimizer=sgd(0.1),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            batch_size=8,
            steps=2,
            ledger=LedgerFile(tmp_path / f"{i}.ledger", budget=Budget(epsilon=0.01 if i == 1 else 100.0, delta=1e-5)),
        )
        for i in range(3)
    ]
    server = FederatedServer(net(), plan=plan(clients=3, noise_multiplier=1.0))
    chosen = server.open_round([client.name for client in clients])
    request = server.request()
    summary = server.close_round([client.answer(request) for client in clients])
    assert chosen == ("client-0", "client-1", "client-2")
    assert dict(summary.private.outcomes) == {"client-0": "accepted", "client-1": "budget", "client-2": "accepted"}
    assert (summary.noise_std, summary.denominator) == (1.0, 3.0)
    assert server.epsilon(1e-5) == pytest.approx(plan(noise_multiplier=1.0, rounds=1).epsilon(1e-5))
