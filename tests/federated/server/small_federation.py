"""Clients that send what a test tells them to, and the server that asks them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from scipy.stats import chi2
from torch import Tensor

from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.federated.messages import FitReply
from dpdl.federated.server import FederatedServer


def names(count: int) -> list[str]:
    return [f"client-{number}" for number in range(count)]


def zeros(*, scalar: bool = False) -> dict[str, Tensor]:
    state = {"weight": torch.zeros(3, 4), "bias": torch.zeros(2)}
    return {**state, "scale": torch.zeros(())} if scalar else state


def update(size: float, *, like: Mapping[str, Tensor] | None = None, seed: int = 0) -> dict[str, Tensor]:
    """An update of L2 norm `size` in a random direction."""
    generator = torch.Generator().manual_seed(seed)
    like = zeros() if like is None else like
    drawn = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in like.items()}
    norm = norm_of(drawn)
    return {name: tensor * (size / norm) for name, tensor in drawn.items()}


def norm_of(tensors: Mapping[str, Tensor]) -> float:
    """In plain Python floats."""
    return math.sqrt(math.fsum(value * value for tensor in tensors.values() for value in tensor.flatten().tolist()))


def reply(client: str, change: Any, *, round: int = 1, weight: Any = 1.0, metrics: Any = None) -> FitReply:
    return FitReply(client=client, round=round, update=change, weight=weight, metrics=metrics or {})


def plan(**changes: Any) -> ClientLevelPlan:
    """Ten clients, all in each round, no noise, unless a test says otherwise."""
    settings: dict[str, Any] = {
        "clients": 10,
        "rounds": 5,
        "noise_multiplier": 0.0,
        "max_update_norm": 1.0,
        "sampling": "all",
    }
    if "sample_rate" in changes:
        settings["sampling"] = "poisson"
    if "cohort" in changes:
        settings["sampling"] = "fixed_size"
    return ClientLevelPlan(**{**settings, **changes})


def server(*, state: Any = None, seed: int | None = 0, **settings: Any) -> FederatedServer:
    return FederatedServer(zeros() if state is None else state, insecure_seed=seed, **settings)


def std_is(std: float, noise: Tensor) -> bool:
    """Chi-square test of a known mean's variance, p = 1e-4."""
    below = chi2.cdf(float((noise.double() / std).square().sum()), noise.numel())
    return bool(1e-4 < below < 1 - 1e-4)
