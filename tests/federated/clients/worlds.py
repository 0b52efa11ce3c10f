"""Small data, models and clients, and the arguments that most tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import dpdl
from dpdl.federated.client import DPClient
from dpdl.federated.messages import FitRequest

N, FEATURES, CLASSES = 16, 3, 2
DELTA = 1e-5


def records(n: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, CLASSES, (n,), generator=generator)


def network(dtype: torch.dtype = torch.float64, seed: int = 5) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES)).to(dtype)


def weights(seed: int = 7, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A global model that is not the client's own."""
    return {name: tensor.clone() for name, tensor in network(dtype, seed).state_dict().items()}


def sgd(lr: float = 0.5, momentum: float = 0.0) -> Callable[..., torch.optim.Optimizer]:
    return partial(torch.optim.SGD, lr=lr, momentum=momentum)


def client(
    ledger: Any = None,
    *,
    name: str = "ward",
    model: nn.Module | Callable[[], nn.Module] | None = None,
    dataset: Dataset[Any] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    **changed: Any,
) -> DPClient:
    """Three steps a round on half of the records each; a ledger in memory without a budget unless one is given."""
    arguments: dict[str, Any] = {
        "optimizer": sgd(),
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "batch_size": N // 2,
        "steps": 3,
        "ledger": dpdl.Ledger(relation="add_or_remove") if ledger is None else ledger,
    }
    arguments.update(changed)
    if arguments.get("sample_rate") is not None:
        arguments.pop("batch_size")
    return DPClient(
        name,
        network if model is None else model,
        TensorDataset(*records()) if dataset is None else dataset,
        loss_fn,
        **arguments,
    )


def request(round: int = 1, state: Mapping[str, Tensor] | None = None, **changed: Any) -> FitRequest:
    return FitRequest(round=round, state=weights() if state is None else state, **changed)


def ledger_file(folder: Path, epsilon: float | None = None, **changed: Any) -> dpdl.LedgerFile:
    budget = None if epsilon is None else dpdl.Budget(epsilon=epsilon, delta=DELTA)
    return dpdl.LedgerFile(folder / "ward.ledger", budget=budget, **changed)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two mappings hold the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Untouched(Dataset[Any]):
    """Records that nobody may read."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("the data was read")
