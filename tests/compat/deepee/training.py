"""A small model and data for these tests, one deepee step, and what the step should give, one example at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dpdl.compat.deepee import PrivacyWrapper

FEATURES, CLASSES = 3, 2

Loss = Callable[[Tensor, Tensor], Tensor]


def network(seed: int = 5) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()


def examples(n: int, seed: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (n,), generator=generator)


def dataset(n: int) -> TensorDataset:
    return TensorDataset(*examples(n))


def release(model: PrivacyWrapper, x: Tensor, y: Tensor, *, reduce: str = "mean", loss: Loss = F.cross_entropy) -> None:
    """All of a step but the optimizer's."""
    loss(model(x), y).backward()
    model.clip_and_accumulate(reduce=reduce)  # type: ignore[arg-type]
    model.noise_gradient()


def gradients(model: nn.Module) -> Tensor:
    """All p.grad, end to end."""
    found = [p.grad for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in found if g is not None])


def clipped_mean(model: nn.Module, x: Tensor, y: Tensor, max_norm: float) -> Tensor:
    """The mean of clipped gradients, by plain autograd on one example after the other."""
    total = None
    for row, target in zip(x, y, strict=True):
        loss = F.cross_entropy(model(row.unsqueeze(0)), target.unsqueeze(0))
        each = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        vector = torch.cat([g.flatten() for g in each])
        vector = vector * min(1.0, max_norm / float(vector.norm()))
        total = vector if total is None else total + vector
    assert total is not None
    return total / len(x)
