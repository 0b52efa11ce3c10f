"""One run of a sweep: what the user's function is given, and what it gives back.

    def train(point: Point) -> Outcome:
        model, optimizer, loader = point.make_private(*my_model_and_data(lr=point.lr))
        ...                                                         # epochs as usual
        return Outcome(score=accuracy, report=optimizer.report(point.delta))

The function may run in another process: it must be importable there (defined at the top level of a module). It holds
no branch for the non-private line, whose plan has no clipping and no noise: the same loop, the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

from dpdl.errors import ParameterError
from dpdl.execution import Execution
from dpdl.plan import PrivacyPlan
from dpdl.privacy_report import PrivacyReport
from dpdl.private import Private, make_private

__all__ = ["Outcome", "Point", "Train"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run to make. All of it is public: it was fixed before any data were looked at.

    Attributes:
        key: its name in the sweep's files.
        plan: the guarantee; noise 0 and no clipping in the non-private line.
        delta: at which epsilon is reported.
        target: the epsilon that was asked for; None if the plan was given, infinity in the non-private line.
        batch_size: expected examples in a step.
        seed: of the first weights. `sweep` calls `torch.manual_seed(seed)` before the function.
        lr: the learning rate, if the sweep was given some.
        settings: whatever else the sweep was given for the function, the same in each run.
        execution: of the run; secure randomness unless the sweep has an `insecure_seed`.
        folder: a folder of the run's own for what it saves; None if the sweep writes no files.
    """

    key: str
    plan: PrivacyPlan
    delta: float
    target: float | None
    batch_size: int
    seed: int
    lr: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    execution: Execution = field(default_factory=Execution)
    folder: Path | None = None

    @property
    def private(self) -> bool:
        """Whether the run has a guarantee; False in the non-private line."""
        return self.plan.noise_multiplier > 0

    def make_private(self, model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]) -> Private:
        """`dpdl.make_private` with this run's plan and execution.

        Args:
            model, optimizer, loader: as in `dpdl.make_private`.
        """
        return make_private(model, optimizer, loader, self.plan, execution=self.execution)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run came to.

    Args:
        score: the larger the better; of records that the run was not trained on.
        report: `optimizer.report(point.delta)`.
        metrics: further numbers for the tables.

    Raises:
        ParameterError: the score or a metric is no finite number, or the report none.
    """

    score: float
    report: PrivacyReport
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("score", self.score), *self.metrics.items()):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ParameterError(f"{name} must be a finite number, got {value!r}. Give float(accuracy).")
            if not isinstance(name, str):
                raise ParameterError(f"metrics must have names as keys, got {name!r}.")
        if not isinstance(self.report, PrivacyReport):
            raise ParameterError(f"report must be optimizer.report(point.delta), got {type(self.report).__name__}.")


class Train(Protocol):
    """The user's function: trains one run, and scores it on held-out records."""

    def __call__(self, point: Point, /) -> Outcome:
        """Carry out `point.plan`; what came of it."""
        ...
