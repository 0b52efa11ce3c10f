"""A clipping norm that changes along a run. Noise is in units of it, so what a step spends stays the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpdl.compat.opacus.schedulers.schedule import Schedule

__all__ = ["ExponentialGradClip", "LambdaGradClip", "StepGradClip", "_GradClipScheduler"]


class _GradClipScheduler(Schedule):
    """Sets `optimizer.max_grad_norm` at each `step()`; of a list, each number.

    Args:
        optimizer: a private optimizer.
        last_epoch: the epoch before the first.
    """

    attribute = "max_grad_norm"

    def get_max_grad_norm(self) -> Any:
        """The value for this epoch."""
        raise NotImplementedError

    def value(self) -> Any:
        """The value for this epoch."""
        return self.get_max_grad_norm()


class ExponentialGradClip(_GradClipScheduler):
    """Multiplies the clipping norm by `gamma` each epoch.

    Args:
        optimizer, last_epoch: as above.
        gamma: the factor.
    """

    def __init__(self, optimizer: Any, *, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch=last_epoch)

    def get_max_grad_norm(self) -> Any:
        """The value for this epoch."""
        return _times(self.current(), 1 if self.last_epoch == 0 else self.gamma)


class LambdaGradClip(_GradClipScheduler):
    """Multiplies the first clipping norm by a function of the epoch.

    Args:
        optimizer, last_epoch: as above.
        scheduler_function: epoch to factor.
    """

    def __init__(self, optimizer: Any, *, scheduler_function: Callable[[int], float], last_epoch: int = -1) -> None:
        self.scheduler_function = scheduler_function
        self.base_max_grad_norm = optimizer.max_grad_norm
        super().__init__(optimizer, last_epoch=last_epoch)

    def get_max_grad_norm(self) -> Any:
        """The value for this epoch."""
        return _times(self.base_max_grad_norm, self.scheduler_function(self.last_epoch))


class StepGradClip(_GradClipScheduler):
    """Multiplies the clipping norm by `gamma` every `step_size` epochs.

    Args:
        optimizer, last_epoch: as above.
        step_size: epochs.
        gamma: the factor.
    """

    def __init__(self, optimizer: Any, *, step_size: int, gamma: float, last_epoch: int = -1) -> None:
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer, last_epoch=last_epoch)

    def get_max_grad_norm(self) -> Any:
        """The value for this epoch."""
        due = self.last_epoch > 0 and self.last_epoch % self.step_size == 0
        return _times(self.current(), self.gamma if due else 1)


def _times(value: Any, factor: float) -> Any:
    return [number * factor for number in value] if isinstance(value, list) else value * factor
