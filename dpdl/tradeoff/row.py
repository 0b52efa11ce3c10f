"""One row of a sweep's table: what a run was asked, what it came to, or why it failed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from accountants import NeighboringRelation, arguments
from dpdl.errors import CheckpointError, ParameterError
from dpdl.releases import TRAINING_STEP
from dpdl.run_state import step_event
from dpdl.tradeoff.point import Outcome, Point

__all__ = ["COLUMNS", "Row"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run that ended.

    Attributes:
        key: the run's name.
        private: False in the non-private line.
        target: the epsilon asked for; None if the plan was given, infinite in the non-private line.
        epsilon: upper bound at `delta` on what this run released, from its report; of a run that was chosen privately,
            on run and choice together; None if the run failed.
        planned_epsilon: the same of its whole plan: what a run that failed may have spent.
        delta, noise_multiplier, sample_rate, steps, max_grad_norm, batch_size, lr, seed: as in the point.
        score: None if the run failed.
        metrics: as the function gave them.
        secure: whether noise and sampling came from keys that nobody knows; None if the run failed.
        seconds: it took; None where that is kept secret.
        error: why it failed; None if it did not.
        report: the run's report as plain values; None if it failed.
    """

    key: str
    private: bool
    target: float | None
    epsilon: float | None
    planned_epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    max_grad_norm: float
    batch_size: int
    lr: float | None
    seed: int
    score: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    secure: bool | None
    seconds: float | None
    error: str | None
    report: Mapping[str, Any] | None = None

    @property
    def failed(self) -> bool:
        """Whether the run ended with an error."""
        return self.error is not None

    @classmethod
    def of(cls, point: Point, answer: Outcome | str, *, planned_epsilon: float, seconds: float) -> Row:
        """The row of a run: from its outcome, or from the error that ended it.

        A report that is not of the point's plan is an error: its epsilon would stand beside another run's settings.

        Args:
            point: what was to be run.
            answer: its outcome, or the error's text.
            planned_epsilon: of the point's plan.
            seconds: of wall time.
        """
        if isinstance(answer, Outcome):
            answer = _mismatch(point, answer) or answer
        done = answer if isinstance(answer, Outcome) else None
        return cls(
            key=point.key,
            private=point.private,
            target=point.target,
            epsilon=None if done is None else done.report.epsilon,
            planned_epsilon=planned_epsilon,
            delta=point.delta,
            noise_multiplier=point.plan.noise_multiplier,
            sample_rate=point.plan.sample_rate,
            steps=point.plan.steps,
            max_grad_norm=point.plan.max_grad_norm,
            batch_size=point.batch_size,
            lr=point.lr,
            seed=point.seed,
            score=None if done is None else float(done.score),
            metrics={} if done is None else {name: float(value) for name, value in done.metrics.items()},
            secure=None if done is None else done.report.secure_randomness,
            seconds=round(seconds, 2),
            error=answer if isinstance(answer, str) else None,
            report=None if done is None else json.loads(done.report.to_json()),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinity is the string "inf", which JSON can hold."""
        return {name: "inf" if value == math.inf else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """The row that `to_dict` wrote.

        Raises:
            CheckpointError: fields are missing, unknown, or of another kind; or contradict each other.
        """
        if set(values) != {f.name for f in fields(cls)}:
            raise CheckpointError("A row of the sweep is of another version; it cannot be read.")
        plain: dict[str, Any] = {name: math.inf if value == "inf" else value for name, value in values.items()}
        wrong = [name for name, value in plain.items() if not _KINDS[name](value)]
        if (plain["error"] is None) == any(plain[name] is None for name in ("epsilon", "score", "secure", "report")):
            wrong.append("error")
        if wrong:
            shown = arguments.shown(values[wrong[0]])
            raise CheckpointError(
                f"A row of the sweep is damaged: {wrong[0]} is {shown}. Start anew in another output."
            )
        return cls(**plain)


COLUMNS = tuple(f.name for f in fields(Row) if f.name not in ("metrics", "report"))


def _number(value: object) -> bool:
    return type(value) in (int, float) and value >= 0  # type: ignore[operator]


def _finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf  # type: ignore[arg-type]


def _whole(value: object) -> bool:
    return type(value) is int and 0 <= value <= arguments.MOST


def _text(value: object) -> bool:
    return isinstance(value, str)


def _flag(value: object) -> bool:
    return type(value) is bool


def _object(value: object) -> bool:
    return isinstance(value, dict)


def _finite_ones(value: object) -> bool:
    return isinstance(value, dict) and all(_finite(each) for each in value.values())


def _or_none(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or kind(value)


_KINDS: dict[str, Callable[[object], bool]] = {
    "key": _text,
    "private": _flag,
    "target": _or_none(_number),
    "epsilon": _or_none(_number),
    "planned_epsilon": _number,
    "delta": _number,
    "noise_multiplier": _number,
    "sample_rate": _number,
    "steps": _whole,
    "max_grad_norm": _number,
    "batch_size": _whole,
    "lr": _or_none(_number),
    "seed": _whole,
    "score": _or_none(_finite),
    "metrics": _finite_ones,
    "secure": _or_none(_flag),
    "seconds": _or_none(_number),
    "error": _or_none(_text),
    "report": _or_none(_object),
}


def _mismatch(point: Point, outcome: Outcome) -> str | None:
    report, plan = outcome.report, point.plan
    for name, found, asked in (
        ("sample_rate", report.sample_rate, plan.sample_rate),
        ("noise_multiplier", report.noise_multiplier, plan.noise_multiplier),
        ("max_grad_norm", report.max_grad_norm, plan.max_grad_norm),
        ("planned_steps", report.planned_steps, plan.steps),
        ("delta", report.delta, point.delta),
        ("relation", report.relation, NeighboringRelation(plan.relation).phrase),
    ):
        if found != asked:
            return str(
                ParameterError(
                    f"the report's {name} is {found}, but the point's is {asked}. Train with point.make_private, and "
                    "return optimizer.report(point.delta) of that run."
                )
            )
    step = step_event(plan)
    beside = [release for release in report.releases if release.event != step or release.label != TRAINING_STEP]
    if report.step != step or beside or report.dataset is not None:
        what = f"other releases: {beside[0].event} ({beside[0].label})" if beside else "another step, or other runs"
        return str(
            ParameterError(
                f"the report is not of the point's steps alone, but of {what}. What the sweep claims would not cover "
                "them. Train with point.make_private, and record nothing else in that run."
            )
        )
    if report.steps == 0:
        return "the report is of no step: nothing was trained"
    return None
