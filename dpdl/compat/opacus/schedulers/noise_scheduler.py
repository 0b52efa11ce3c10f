"""Noise that changes along a run. The accountant is told the multiplier of each step as it is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpdl.compat.opacus.schedulers.schedule import Schedule

__all__ = ["ExponentialNoise", "LambdaNoise", "StepNoise", "_NoiseScheduler"]


class _NoiseScheduler(Schedule):
    """Sets `optimizer.noise_multiplier` at each `step()`.

    Args:
        optimizer: a private optimizer.
        last_epoch: the epoch before the first.
    """

    attribute = "noise_multiplier"

    def get_noise_multiplier(self) -> float:
        """The value for this epoch."""
        raise NotImplementedError

    def value(self) -> float:
        """The value for this epoch."""
        return self.get_noise_multiplier()


class ExponentialNoise(_NoiseScheduler):
    """Multiplies the noise multiplier by `gamma` each epoch.

    Args:
        optimizer, last_epoch: as above.
        gamma: the factor.
    """

    def __init__(self, optimizer: Any, *, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch=last_epoch)

    def get_noise_multiplier(self) -> float:
        """The value for this epoch."""
        return float(self.current()) * (1 if self.last_epoch == 0 else self.gamma)


class LambdaNoise(_NoiseScheduler):
    """Multiplies the first noise multiplier by a function of the epoch.

    Args:
        optimizer, last_epoch: as above.
        noise_lambda: epoch to factor.
    """

    def __init__(self, optimizer: Any, *, noise_lambda: Callable[[int], float], last_epoch: int = -1) -> None:
        self.noise_lambda = noise_lambda
        self.base_noise_multiplier = optimizer.noise_multiplier
        super().__init__(optimizer, last_epoch=last_epoch)

    def get_noise_multiplier(self) -> float:
        """The value for this epoch."""
        return float(self.base_noise_multiplier * self.noise_lambda(self.last_epoch))


class StepNoise(_NoiseScheduler):
    """Multiplies the noise multiplier by `gamma` every `step_size` epochs.

    Args:
        optimizer, last_epoch: as above.
        step_size: epochs.
        gamma: the factor.
    """

    def __init__(self, optimizer: Any, *, step_size: int, gamma: float, last_epoch: int = -1) -> None:
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer, last_epoch=last_epoch)

    def get_noise_multiplier(self) -> float:
        """The value for this epoch."""
        due = self.last_epoch > 0 and self.last_epoch % self.step_size == 0
        return float(self.current()) * (self.gamma if due else 1)
