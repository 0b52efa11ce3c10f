"""Runs that differ in their seed only, taken together: mean and standard deviation of the score."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from dpdl.tradeoff.row import Row

__all__ = ["Summary", "summaries"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One setting over its seeds.

    Attributes:
        private: False in the non-private line.
        target: the epsilon asked for, if one was.
        epsilon: the largest of the runs' upper bounds.
        noise_multiplier, max_grad_norm, batch_size, lr: as in the rows.
        runs: how many the mean is of.
        mean: of the scores.
        sd: their sample standard deviation (n - 1); None for a single run.
    """

    private: bool
    target: float | None
    epsilon: float
    noise_multiplier: float
    max_grad_norm: float
    batch_size: int
    lr: float | None
    runs: int
    mean: float
    sd: float | None


def summaries(rows: Iterable[Row]) -> tuple[Summary, ...]:
    """Each setting's rows that did not fail, in the order in which settings first appear."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.score is not None:
            own = (row.private, row.target, row.noise_multiplier, row.sample_rate, row.steps)
            groups.setdefault((*own, row.max_grad_norm, row.batch_size, row.lr), []).append(row)
    return tuple(_summary(group) for group in groups.values())


def _summary(rows: list[Row]) -> Summary:
    first = rows[0]
    scores = [row.score for row in rows if row.score is not None]
    return Summary(
        private=first.private,
        target=first.target,
        epsilon=max(row.epsilon for row in rows if row.epsilon is not None),
        noise_multiplier=first.noise_multiplier,
        max_grad_norm=first.max_grad_norm,
        batch_size=first.batch_size,
        lr=first.lr,
        runs=len(rows),
        mean=statistics.fmean(scores),
        sd=statistics.stdev(scores) if len(scores) > 1 else None,
    )
