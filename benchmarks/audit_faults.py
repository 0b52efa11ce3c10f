"""Planted faults: what goes wrong in private training, done to this library on purpose.

Each is a context in which training runs as usual and claims what its plan claims. The audit is told nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpdl.noise import gaussian_mechanism

__all__ = ["FAULTS", "planted"]

CORRECT = "correct"
HALVED = "noise halved"
NO_CLIP = "clip removed"
SHUFFLED = "shuffled, accounted as Poisson"
REUSED = "noise seed reused at each step"
FAULTS = (CORRECT, HALVED, NO_CLIP, SHUFFLED, REUSED)

_MECHANISM = "dpdl.optim.private_optimizer.gaussian_mechanism"
_SAMPLER = "dpdl.loader.PoissonSampler"
_WEIGHTS = "dpdl.private.flat_weights"


def planted(fault: str) -> AbstractContextManager[Any]:
    """Training inside has the fault."""
    plants: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        CORRECT: nullcontext,
        HALVED: lambda: patch(_MECHANISM, _half_the_noise),
        NO_CLIP: lambda: patch(_WEIGHTS, _ones),
        SHUFFLED: lambda: patch(_SAMPLER, _Shuffled),
        REUSED: lambda: patch(_MECHANISM, _the_first_noise_again),
    }
    return plants[fault]()


def _half_the_noise(*args: Any, noise_multiplier: float, **kwargs: Any) -> Any:
    return gaussian_mechanism(*args, noise_multiplier=noise_multiplier / 2, **kwargs)


def _the_first_noise_again(*args: Any, step: int, **kwargs: Any) -> Any:
    return gaussian_mechanism(*args, step=0, **kwargs)


def _ones(norms: Tensor, *, max_grad_norm: float) -> Tensor:
    return torch.ones_like(norms)


class _Shuffled:
    """What most loaders do: each pass deals a shuffled data set out, so that an example is in exactly one batch."""

    def __init__(self, dataset_size: int, sample_rate: float, stream: Any) -> None:
        self._size, self._batches = dataset_size, round(1 / sample_rate)
        self.dataset_size, self.sample_rate = dataset_size, sample_rate

    def draw(self, step: int) -> NDArray[np.int64]:
        if step % self._batches == 0:
            self._dealt = np.array_split(np.random.default_rng().permutation(self._size), self._batches)
        batch: NDArray[np.int64] = np.sort(self._dealt[step % self._batches])
        return batch
