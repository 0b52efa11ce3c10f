"""A small run through the facade, and what plain arithmetic says its first step is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dpdl.compat.opacus import PrivacyEngine
from tests.oracles.one_at_a_time import per_sample_gradients

N, FEATURES, CLASSES, LR = 12, 3, 2, 0.5


def examples(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(41)
    x = torch.randn(n, FEATURES, generator=generator) * 3
    return x, torch.randint(0, CLASSES, (n,), generator=generator)


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    generator = torch.Generator().manual_seed(42)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return net


def loader(*, n: int = N, batch_size: int = N, **settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*examples(n)), batch_size=batch_size, **settings)


def private(
    engine: PrivacyEngine | None = None,
    model: nn.Module | None = None,
    *,
    data: DataLoader[Any] | None = None,
    **how: Any,
) -> Any:
    """What make_private returns; every example in every batch and no noise unless told otherwise."""
    model = network() if model is None else model
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, **how}
    return (engine or PrivacyEngine()).make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LR),
        data_loader=loader() if data is None else data,
        **settings,
    )


def step(model: Any, optimizer: Any, batch: Any, criterion: Any = F.cross_entropy) -> None:
    x, y = batch
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()


def clipped_sum(
    model: nn.Module, x: Tensor, y: Tensor, bound: float | list[float], loss: Any = F.cross_entropy
) -> dict[str, Tensor]:
    """Gradients one at a time in float64, scaled to the bound (one over all, or one each), added up."""
    rows = per_sample_gradients(copy.deepcopy(model), loss, x, y)
    norms = {name: g.flatten(1).norm(dim=1) for name, g in rows.items()}
    if isinstance(bound, list):
        factors = {name: (c / norms[name]).clamp(max=1) for name, c in zip(rows, bound, strict=True)}
    else:
        flat = torch.stack(list(norms.values())).norm(dim=0)
        factors = dict.fromkeys(rows, (bound / flat).clamp(max=1))
    return {name: torch.einsum("n,n...->...", factors[name], g) for name, g in rows.items()}


def assert_moved_by(before: nn.Module, after: nn.Module, gradient: dict[str, Tensor]) -> None:
    """Whether plain SGD with this gradient leads from one module to the other."""
    new = dict(after.named_parameters())
    for name, p in before.named_parameters():
        expected = p.detach().double() - LR * gradient[name]
        torch.testing.assert_close(new[name].detach().double(), expected, rtol=1e-4, atol=1e-5)
