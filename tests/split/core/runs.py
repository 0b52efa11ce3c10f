"""A split run of a case, with what it draws and sums laid open."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import dpdl
from accountants import Gaussian
from dpdl.sampling import PoissonSampler
from dpdl.secure_random import RandomStream
from dpdl.split import party
from dpdl.split.clip import Clip, JointClip, PartClip
from dpdl.split.session import SplitRun
from dpdl.types import ClippedSum, NoisyGradient
from tests.split.core.networks import ROWS, Case

SEED = 11
RATE = 0.2


def plan_of(**changes: Any) -> dpdl.PrivacyPlan:
    settings: dict[str, Any] = {
        "sample_rate": 0.1,
        "expected_batch_size": 6,
        "steps": 50,
        "noise_multiplier": 0.0,
        "max_grad_norm": 0.7,
        "dataset_size": ROWS,
        **changes,
    }
    return dpdl.PrivacyPlan(**settings)


def run_of(
    case: Case, plan: dpdl.PrivacyPlan, *, clip: Clip | None = None, rate: float = RATE, **more: Any
) -> SplitRun:
    graph = case.graph(case.modules)
    by_party: dict[str, list[Tensor]] = {}
    for part in graph.trained:
        assert part.module is not None
        by_party.setdefault(part.party, []).extend(part.module.parameters())
    optimizers = {name: torch.optim.SGD(held, lr=rate) for name, held in by_party.items()}
    execution = more.pop("execution", dpdl.Execution(insecure_seed=SEED, accumulate_dtype=torch.float64))
    return SplitRun(graph, optimizers, case.data, plan, clip=clip, driver=case.driver, execution=execution, **more)


def batches(run: SplitRun, steps: int) -> list[list[int]]:
    """The rows that a seeded run draws, from its seed."""
    name = run.client.party.name
    stream = RandomStream.from_insecure_seed(SEED).child(f"{name} for {run.client.name}").child("sampling")
    sampler = PoissonSampler(ROWS, run.client.plan.sample_rate, stream)
    return [sampler.draw(number).tolist() for number in range(steps)]


@dataclass
class Mechanism:
    """Stands in for the Gaussian mechanism: keeps every sum, and adds noise that the test knows.

    Attributes:
        sums: by step, all parties' together.
        scales: noise std that each call would have had.
    """

    noise: Callable[[int, str, Tensor], Tensor] | None = None
    sums: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    scales: list[float] = field(default_factory=list)
    examples: dict[int, set[int]] = field(default_factory=dict)

    def __call__(
        self, clipped: ClippedSum, *, noise_multiplier: float, stream: RandomStream, step: int, reuse: bool
    ) -> NoisyGradient:
        self.sums.setdefault(step, {}).update({name: t.clone() for name, t in clipped.tensors.items()})
        self.scales.append(noise_multiplier * clipped.sensitivity)
        self.examples.setdefault(step, set()).add(clipped.examples)
        noisy = {n: t if self.noise is None else t + self.noise(step, n, t) for n, t in clipped.tensors.items()}
        return NoisyGradient(tensors=noisy, event=Gaussian(noise_multiplier))

    def use(self, monkeypatch: pytest.MonkeyPatch) -> Mechanism:
        monkeypatch.setattr(party, "gaussian_mechanism", self)
        return self


def known_noise(step: int, name: str, like: Tensor) -> Tensor:
    seed = 7919 * step + sum(map(ord, name))
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def clips(case: Case, kind: str) -> tuple[Clip, dict[str, float] | None, float | None, float]:
    """A clip, and what the oracle needs: norms of parts, or one for all; and the total."""
    trained = [part.name for part in case.graph(case.modules).trained]
    if kind == "joint":
        return JointClip(max_grad_norm=0.7), None, 0.7, 0.7
    if kind == "none":
        return PartClip(max_grad_norm=math.inf), dict.fromkeys(trained, math.inf), None, math.inf
    norms = {name: 0.1 + 0.15 * number for number, name in enumerate(trained)}
    return PartClip(max_grad_norm=norms), norms, None, math.sqrt(sum(c**2 for c in norms.values()))
