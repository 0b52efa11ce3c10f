"""What a run's releases mean: epsilon over its steps and at other deltas, and what an attacker can do with them.

All of it is computed by the accountants from the releases themselves, never from the one (epsilon, delta) that is
claimed: a curve says more than any of its points. Every number is a bound on the safe side, not rounded for show.

References:
    Dong, Roth, Su, Gaussian Differential Privacy, 2019. arXiv:1905.02383 (the trade-off curve)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

import accountants
from accountants import Composed, EpsilonDelta, Event, NeighboringRelation, PRVAccountant

__all__ = ["DELTAS", "AtDelta", "Membership", "Readings", "Spent", "StepPoint", "TradeOff", "most_spent", "readings"]

DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)  # where epsilon is given, besides at the claim's own
FALSE_POSITIVE_RATES = (1e-3, 1e-2, 1e-1)
PRIORS = (0.5, 0.1, 0.01)
FAILURE = 1e-3  # the chance that a posterior may be larger: with Gaussian noise no bound holds without one
STEP_POINTS = 32  # of the curve over the steps
TRADE_OFF_POINTS = 100  # of the trade-off curve

Counts = Mapping[Event, int]


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What was released, and what is planned.

    Attributes:
        run: how many releases of each kind the run has made.
        step: one step of the plan.
        steps: how many of them are among `run`.
        planned_steps: how many the plan allows.
        dataset: how many releases of each kind all runs on the data have made; None if the run shares no ledger.
        guarantee: (epsilon, delta) that holds for all of these instead, whatever they are; None if there is none.
        relation: what neighbouring datasets differ in.
    """

    run: Counts
    step: Event
    steps: int
    planned_steps: int
    dataset: Counts | None
    guarantee: tuple[float, float] | None
    relation: NeighboringRelation

    def after(self, steps: int) -> dict[Event, int]:
        """All other releases of the run, and this many steps."""
        counts = dict(self.run)
        counts[self.step] = counts.get(self.step, 0) + steps - self.steps
        return {event: count for event, count in counts.items() if count}

    @property
    def most_steps(self) -> int:
        """How many steps there will be."""
        return max(self.steps, self.planned_steps)


@dataclass(frozen=True, kw_only=True)
class StepPoint:
    """Epsilon, an upper bound, after so many steps; `planned` if they are not taken yet."""

    step: int
    epsilon: float
    planned: bool


@dataclass(frozen=True, kw_only=True)
class AtDelta:
    """Upper bounds on epsilon at one delta: so far, after all planned steps, and of all runs, if a ledger is shared."""

    delta: float
    so_far: float
    planned: float
    all_runs: float | None


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """Lower bounds `beta` on the type II error of any test whose type I error is `alpha`, ascending."""

    alpha: tuple[float, ...]
    beta: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Membership:
    """Upper bounds on any membership attack.

    Attributes:
        advantage: true positive rate - false positive rate.
        accuracy: how often a guess between in and out, equally likely, is right.
        true_positive_rates: pairs (false positive rate, true positive rate at it).
        posteriors: pairs (belief before, belief after), which may be exceeded with probability `failure`.
        failure: that probability.
    """

    advantage: float
    accuracy: float
    true_positive_rates: tuple[tuple[float, float], ...]
    posteriors: tuple[tuple[float, float], ...]
    failure: float


@dataclass(frozen=True, kw_only=True)
class Readings:
    """All of it.

    Attributes:
        at_deltas: epsilon at several deltas, the largest delta first.
        over_steps: epsilon at the claim's delta over the steps. Other releases of the run are counted from the start.
        trade_off: of the run so far.
        membership: of the run so far.
        dataset_membership: of all runs on the data, if the run shares a ledger.

    Where epsilon is infinite at the claim's delta all but `at_deltas` is None: there is nothing to draw.
    """

    at_deltas: tuple[AtDelta, ...]
    over_steps: tuple[StepPoint, ...] | None
    trade_off: TradeOff | None
    membership: Membership | None
    dataset_membership: Membership | None

    def to_dict(self) -> dict[str, Any]:
        """The readings as plain values; an infinite epsilon is the string "inf"."""
        values = asdict(self)
        for row in values["at_deltas"]:
            row.update({name: "inf" if value == math.inf else value for name, value in row.items()})
        return values


def readings(spent: Spent, *, delta: float, deltas: Sequence[float] = ()) -> Readings:
    """What these releases mean.

    Args:
        spent: the releases.
        delta: of the claim, in (0, 1).
        deltas: others at which epsilon is wanted, besides those that are always given.

    Guarantee:
        Every epsilon, true positive rate, posterior and advantage is an upper bound, every beta a lower one, for
        releases fixed in advance; for those of the dataset under an adaptive budget, for any.

    Raises:
        ParameterError: a delta outside (0, 1).
    """
    whole = _epsilon(spent.run, spent.relation, delta)
    guaranteed = math.isfinite(whole)
    event = _composed(spent.run)
    return Readings(
        at_deltas=_at_each(spent, sorted({*DELTAS, delta, *deltas}, reverse=True)),
        over_steps=_over_steps(spent, delta) if guaranteed else None,
        trade_off=_trade_off(event, spent.relation) if guaranteed else None,
        membership=_membership(event, spent.relation) if guaranteed else None,
        dataset_membership=_of_dataset(spent, delta) if guaranteed else None,
    )


def most_spent(spent: Spent, *, delta: float, relation: NeighboringRelation) -> float:
    """What the run's releases promise under a neighbouring relation: so far or with all planned steps, the larger.

    Args:
        spent: the releases, of which each must mean the same under this relation as under their own.
        delta: in (0, 1).
        relation: what neighbouring datasets differ in.

    Guarantee:
        An upper bound on epsilon, as of `readings`.

    Raises:
        ParameterError: delta is outside (0, 1).
        UnsupportedEventError: nothing is proved for one of the releases under this relation.
    """
    (row,) = _at_each(replace(spent, relation=relation, dataset=None, guarantee=None), [delta])
    return max(row.so_far, row.planned)


def _at_each(spent: Spent, deltas: Sequence[float]) -> tuple[AtDelta, ...]:
    so_far = _accountant(spent.run, spent.relation)
    planned = _accountant(spent.after(spent.most_steps), spent.relation)
    of_all = _of_all(spent)
    return tuple(
        AtDelta(
            delta=delta,
            so_far=so_far.epsilon(delta),
            planned=planned.epsilon(delta),
            all_runs=None if of_all is None else of_all(delta),
        )
        for delta in deltas
    )


def _of_all(spent: Spent) -> Callable[[float], float] | None:
    """From delta to the epsilon of all runs; None if the run shares no ledger."""
    if spent.dataset is None:
        return None
    if spent.guarantee is None:
        return _accountant(spent.dataset, spent.relation).epsilon
    epsilon, least = spent.guarantee
    return lambda delta: epsilon if delta >= least else math.inf


def _over_steps(spent: Spent, delta: float) -> tuple[StepPoint, ...] | None:
    """Denser at the start, where epsilon grows fastest; with the step at which the run stands."""
    most = spent.most_steps
    grid = {round(most * (i / STEP_POINTS) ** 2) for i in range(STEP_POINTS + 1)} | {spent.steps}
    points = tuple(
        StepPoint(step=step, epsilon=_epsilon(spent.after(step), spent.relation, delta), planned=step > spent.steps)
        for step in sorted(grid)
    )
    return points if all(math.isfinite(point.epsilon) for point in points) else None


def _trade_off(event: Event, relation: NeighboringRelation) -> TradeOff:
    """Denser at both ends, where a good curve bends."""
    half = 0.5 * np.linspace(0, 1, TRADE_OFF_POINTS // 2 + 1) ** 2
    alpha = np.concatenate([half, 1 - half[-2::-1]])
    beta = accountants.trade_off(event, alpha, relation=relation)
    return TradeOff(alpha=tuple(alpha.tolist()), beta=tuple(beta.tolist()))


def _membership(event: Event, relation: NeighboringRelation) -> Membership:
    rates = accountants.tpr_at_fpr(event, FALSE_POSITIVE_RATES, relation=relation).tolist()
    return Membership(
        advantage=accountants.advantage(event, relation=relation),
        accuracy=accountants.bayes_accuracy(event, 0.5, relation=relation),
        true_positive_rates=tuple(zip(FALSE_POSITIVE_RATES, rates, strict=True)),
        posteriors=tuple(
            (prior, accountants.posterior(event, prior, failure=FAILURE, relation=relation)) for prior in PRIORS
        ),
        failure=FAILURE,
    )


def _of_dataset(spent: Spent, delta: float) -> Membership | None:
    """Of all runs together, where they have a guarantee at the claim's delta."""
    of_all = _of_all(spent)
    if spent.dataset is None or of_all is None or math.isinf(of_all(delta)):
        return None
    event = _composed(spent.dataset) if spent.guarantee is None else EpsilonDelta(*spent.guarantee)
    return _membership(event, spent.relation)


def _epsilon(counts: Counts, relation: NeighboringRelation, delta: float) -> float:
    return _accountant(counts, relation).epsilon(delta)


def _accountant(counts: Counts, relation: NeighboringRelation) -> PRVAccountant:
    accountant = PRVAccountant(relation=relation)
    accountant.compose(_composed(counts))
    return accountant


def _composed(counts: Counts) -> Event:
    return Composed(tuple(event * count for event, count in counts.items()))
