"""Trying many configurations and publishing the best."""

from __future__ import annotations

import dataclasses

from accountants.events.event import Event, require_event
from accountants.tuning import Repetitions


@dataclasses.dataclass(frozen=True)
class RepeatAndSelect(Event, kind="repeat_and_select"):
    """The best of K runs of `event`, K drawn at random and kept secret: see `accountants.tuning` for what is required.

    Known by its Renyi curve only, at whatever relation and group size the runs are accounted.

    Args:
        event: one run, the choice of its hyperparameters and its score included.
        mean: E[K], >= 1 (Poisson: > 0).
        shape: eta > -1 of the truncated negative binomial; 0 logarithmic, 1 geometric, math.inf Poisson.

    References:
        Papernot, Steinke, Hyperparameter Tuning with Renyi Differential Privacy, 2022. arXiv:2110.03620
    """

    event: Event
    mean: float
    shape: float

    def __post_init__(self) -> None:
        require_event("RepeatAndSelect", self.event)
        repetitions = self.repetitions
        object.__setattr__(self, "mean", repetitions.mean)
        object.__setattr__(self, "shape", repetitions.shape)

    @property
    def repetitions(self) -> Repetitions:
        """The law of K."""
        return Repetitions(mean=self.mean, shape=self.shape)
