"""Training code as a user would write it, with a fault of `benchmarks.audit_faults` planted, or with one more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import dpdl
from benchmarks import audit_faults
from benchmarks.audit_faults import CORRECT, HALVED, NO_CLIP, REUSED, SHUFFLED
from dpdl.noise.gaussian import gaussian_mechanism
from dpdl.secure_random import RandomStream
from dpdl.types import ClippedSum, NoisyGradient

__all__ = ["CORRECT", "FAULTS", "HALVED", "NO_CLIP", "REUSED", "SAME_KEY", "SHUFFLED", "trainer"]

SAME_KEY = "noise of the same key in each run"
FAULTS = (*audit_faults.FAULTS, SAME_KEY)


def planted(fault: str) -> AbstractContextManager[Any]:
    """Training inside has the fault."""
    if fault == SAME_KEY:
        return patch("dpdl.optim.private_optimizer.gaussian_mechanism", _same_key)
    return audit_faults.planted(fault)


def _same_key(clipped: ClippedSum, *, stream: RandomStream, **rest: Any) -> NoisyGradient:
    return gaussian_mechanism(clipped, stream=RandomStream.from_insecure_seed(0), **rest)


def trainer(
    plan: dpdl.PrivacyPlan, *, fault: str = CORRECT, lr: float = 0.1, **execution: Any
) -> Callable[[nn.Module, Dataset[Any]], dpdl.PrivateOptimizer]:
    """Training code under a plan: plain SGD on cross-entropy, for all steps of the plan.

    Args:
        plan: its expected_batch_size is taken from the data: sample_rate x n.
        fault: one of `FAULTS`.
        lr: of SGD.
        execution: passed to `dpdl.Execution`.
    """

    def train(model: nn.Module, dataset: Dataset[Any]) -> dpdl.PrivateOptimizer:
        size = len(dataset)  # type: ignore[arg-type]
        held = replace(plan, expected_batch_size=plan.sample_rate * size, dataset_size=None)
        loader: Any = DataLoader(dataset, batch_size=max(1, round(plan.sample_rate * size)))
        plain = torch.optim.SGD(model.parameters(), lr=lr)
        with planted(fault):
            private, optimizer, loader = dpdl.make_private(
                model, plain, loader, held, execution=dpdl.Execution(**execution)
            )
            while optimizer.steps_taken < plan.steps:
                for x, y in loader:
                    optimizer.zero_grad()
                    F.cross_entropy(private(x), y).backward()
                    optimizer.step()
        return optimizer

    return train
