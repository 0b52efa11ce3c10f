"""A small federation: separable points, a linear model, clients with ledgers in a folder."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpdl.execution import Execution
from dpdl.federated.client import DPClient
from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.federated.messages import Client
from dpdl.federated.server import FederatedServer

SIGMA, RATE, STEPS = 1.0, 1 / 8, 4
QUICK = Execution(engine="vmap", self_check=False)  # each message makes a client, whose checks take their time


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(4, 2)


def points(index: int, count: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


def make_client(index: int, number: int, *, ledger: Any, **more: Any) -> DPClient:
    settings: dict[str, Any] = {"steps": STEPS, "insecure_seed": 1, "execution": QUICK, **more}
    return DPClient(
        f"client-{index}",
        model,
        points(index),
        F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=0.5),
        noise_multiplier=SIGMA,
        max_grad_norm=1.0,
        sample_rate=RATE,
        ledger=ledger,
        **settings,
    )


def plan(**changes: Any) -> ClientLevelPlan:
    settings = {"clients": 4, "sample_rate": 0.5, "rounds": 8, "noise_multiplier": 1.0, "max_update_norm": 0.5}
    return ClientLevelPlan(**(settings | changes))  # type: ignore[arg-type]


def server(**changes: Any) -> FederatedServer:
    return FederatedServer(model(), **({"insecure_seed": 2} | changes))


def ledger_of(folder: Path, index: int) -> Path:
    return folder / f"client-{index}.ledger"


def same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def play(server: FederatedServer, clients: Iterable[Client], *, rounds: int) -> None:
    """Rounds in one process."""
    by_name = {client.name: client for client in clients}
    for _ in range(rounds):
        chosen = server.open_round(tuple(by_name))
        request = server.request()
        server.close_round([by_name[name].answer(request) for name in chosen])
