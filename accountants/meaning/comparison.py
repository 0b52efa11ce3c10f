"""Two plans side by side: which spends less, at every epsilon or only at some.

One (epsilon, delta) does not order two plans: their curves may cross. The comparison reads both curves from epsilon 0
to where both deltas are about 1e-10, with certified bounds on either side, and claims only what those separate.

The excess risk is the divergence of [1], in its Bayesian form: by how much the accuracy of the best attacker may rise,
at the prior where that is most, when one plan replaces the other. For symmetric curves

    excess = max over eps >= 0 of  (delta_new(eps) - delta_old(eps)) / (1 + e^eps),

attained at the prior 1 / (1 + e^eps); 0 if the new plan's curve is nowhere above the old one's.

References:
    [1] Kaissis, Kolek, Balle, Hayes, Rueckert, Beyond the Calibration Point: Mechanism Comparison in Differential
        Privacy, 2024. arXiv:2406.08918
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from accountants.accountant import Accountant
from accountants.components.component import Array
from accountants.events import Event
from accountants.interval import Interval
from accountants.meaning import attacks
from accountants.meaning.trade_off_curve import spent_by
from accountants.queries import AccountantName
from accountants.relation import NeighboringRelation

Verdict = Literal["a", "b", "cross", "undecided"]

_LEAST_DELTA = 1e-10  # where reading the curves ends
_FARTHEST = 600.0  # epsilon
_POINTS = 12  # of each plan's own range; both ranges are read for both plans
_EXCESS_WIDTH = 1e-3  # cells that leave the excess risk less certain are halved
_ROUNDS = 4  # of that
_HALVINGS = 8  # of the bracket around a crossing
_ROUNDING = 1e-14  # of the divergence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One side of a comparison.

    Attributes:
        event: what is released.
        epsilons: bounds on epsilon at each of the comparison's deltas.
        advantage: bounds on delta(0), the best attacker's true positive rate - false positive rate.
        true_positive_rates: upper bounds, at each of the comparison's false positive rates.
        excess_risk: bounds on the accuracy that the best attacker may gain if this plan replaces the other one.
    """

    event: Event
    epsilons: tuple[Interval, ...]
    advantage: Interval
    true_positive_rates: tuple[float, ...]
    excess_risk: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found.

    Attributes:
        a: the first plan.
        b: the second plan.
        relation: the neighbouring relation.
        deltas: where the plans' epsilons are given.
        false_positive_rates: where their true positive rates are given.
        verdict: "a" or "b" if that plan's delta is certified to be the smaller at every epsilon read, "cross" if each
            is somewhere, "undecided" otherwise.
        crossings: for "cross", brackets in epsilon, each with a certified sign at one end and the other at the other.
        undecided: epsilons read at which the certified bounds overlap.
        reach: the largest epsilon read.
    """

    a: Plan
    b: Plan
    relation: NeighboringRelation
    deltas: tuple[float, ...]
    false_positive_rates: tuple[float, ...]
    verdict: Verdict
    crossings: tuple[Interval, ...]
    undecided: tuple[float, ...]
    reach: float


def compare(
    a: Event,
    b: Event,
    *,
    deltas: Sequence[float] = (1e-3, 1e-5, 1e-8),
    false_positive_rates: Sequence[float] = (1e-3, 1e-2, 1e-1),
    accountant: AccountantName | str = "prv",
    relation: NeighboringRelation | str = NeighboringRelation.ADD_OR_REMOVE,
) -> Comparison:
    """Compare what two plans spend.

    Args:
        a: one plan, as an event.
        b: the other.
        deltas: where to give epsilon, each in (0, 1).
        false_positive_rates: where to bound true positive rates, each in [0, 1].
        accountant: one that bounds from both sides; with "rdp", which does not, the verdict is "undecided".
        relation: the neighbouring relation.

    Guarantee:
        Every epsilon, advantage and excess risk lies in its interval; a verdict "cross" is certified. "a" and "b" are
        certified at the epsilons read, which are dense but finitely many.

    Raises:
        ParameterError: not an event, a delta or rate out of range, an unknown accountant or relation.
        UnsupportedEventError: the accountant has no proof for an event.

    Example:
        >>> from accountants.events import Gaussian
        >>> result = compare(Gaussian(1.0), Gaussian(2.0))
        >>> result.verdict, result.b.excess_risk.upper < 1e-9
        ('b', True)
        >>> [round(interval.upper, 2) for interval in result.b.epsilons]
        [1.35, 1.99, 2.71]
    """
    spent = tuple(spent_by(event, accountant=accountant, relation=relation) for event in (a, b))
    bounds = _read(*spent)
    epsilons = bounds[0].epsilons
    signs = [_sign(*pair) for pair in zip(bounds[0].intervals, bounds[1].intervals, strict=True)]
    plans = [
        Plan(
            event=event,
            epsilons=tuple(one.interval(delta) for delta in deltas),
            advantage=own.intervals[0],
            true_positive_rates=tuple(
                attacks.tpr_at_fpr(event, list(false_positive_rates), accountant=accountant, relation=relation).tolist()
            ),
            excess_risk=_excess_risk(own, other),
        )
        for event, one, own, other in zip((a, b), spent, bounds, bounds[::-1], strict=True)
    ]
    return Comparison(
        a=plans[0],
        b=plans[1],
        relation=spent[0].relation,
        deltas=tuple(deltas),
        false_positive_rates=tuple(false_positive_rates),
        verdict=_verdict(signs),
        crossings=tuple(_crossings(spent[0], spent[1], epsilons, signs)),
        undecided=tuple(float(epsilon) for epsilon, sign in zip(epsilons, signs, strict=True) if sign == 0),
        reach=float(epsilons[-1]),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Bounds:
    """Both sides of one privacy curve, at the epsilons read, ascending from 0."""

    epsilons: Array
    intervals: tuple[Interval, ...]
    lower: Array
    upper: Array

    @staticmethod
    def of(spent: Accountant, epsilons: Array, known: _Bounds | None = None) -> _Bounds:
        """Bounds at `epsilons`, and at those already known."""
        found = dict(zip(known.epsilons.tolist(), known.intervals, strict=True)) if known else {}
        found |= {epsilon: spent.delta_interval(epsilon) for epsilon in epsilons.tolist()}
        ordered = sorted(found)
        intervals = tuple(found[epsilon] for epsilon in ordered)
        return _Bounds(np.array(ordered), intervals, *(np.array(side) for side in zip(*intervals, strict=True)))


def _read(a: Accountant, b: Accountant) -> tuple[_Bounds, _Bounds]:
    """Both curves at the same epsilons: the range of each, densest near 0 where delta bends most, then refined."""
    reach = [min(spent.interval(_LEAST_DELTA).upper, _FARTHEST) for spent in (a, b)]
    start = np.unique(np.outer(reach, np.linspace(0, 1, _POINTS) ** 2))
    bounds = _Bounds.of(a, start), _Bounds.of(b, start)
    for _ in range(_ROUNDS):
        pairs = [bounds, bounds[::-1]]
        loose = np.any([_highest_excess(*pair) > _excess(*pair).max() + _EXCESS_WIDTH for pair in pairs], axis=0)
        if not loose.any():
            break
        epsilons = bounds[0].epsilons
        middles = (epsilons[:-1] + epsilons[1:])[loose] / 2
        bounds = _Bounds.of(a, middles, bounds[0]), _Bounds.of(b, middles, bounds[1])
    return bounds


def _sign(a: Interval, b: Interval) -> int | None:
    """Which delta is certified to be the smaller: -1 a, 1 b, 0 neither; None if both are negligible."""
    if max(a.upper, b.upper) < _LEAST_DELTA / 10:
        return None
    return -1 if a.upper < b.lower else 1 if b.upper < a.lower else 0


def _verdict(signs: list[int | None]) -> Verdict:
    found = {sign for sign in signs if sign is not None}
    if {-1, 1} <= found:
        return "cross"
    if found == {-1}:
        return "a"
    return "b" if found == {1} else "undecided"


def _crossings(a: Accountant, b: Accountant, epsilons: Array, signs: list[int | None]) -> list[Interval]:
    """Brackets between neighbouring certified signs that differ, halved while the middle is certified too."""
    certified = [(float(epsilon), sign) for epsilon, sign in zip(epsilons, signs, strict=True) if sign]
    brackets = []
    for (low, before), (high, after) in itertools.pairwise(certified):
        if before == after:
            continue
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            sign = _sign(a.delta_interval(middle), b.delta_interval(middle))
            if sign == before:
                low = middle
            elif sign == after:
                high = middle
            else:
                break
        brackets.append(Interval(low, high))
    return brackets


def _excess_risk(new: _Bounds, old: _Bounds) -> Interval:
    """Bounds on max over eps of (delta_new - delta_old) / (1 + e^eps), between and beyond the points read too."""
    beyond = float(new.upper[-1]) / (1 + math.exp(float(new.epsilons[-1])))
    upper = max([beyond, *_highest_excess(new, old).tolist()])
    return Interval(max(0.0, float(_excess(new, old).max()) - _ROUNDING), max(0.0, upper + _ROUNDING))


def _excess(new: _Bounds, old: _Bounds) -> Array:
    """What the excess is at least, at each point."""
    least: Array = (new.lower - old.upper) / (1 + np.exp(new.epsilons))
    return least


def _highest_excess(new: _Bounds, old: _Bounds) -> Array:
    """What the excess is at most, in each cell between two points; its ends included.

    There, delta_new is below its chord in x = e^eps and delta_old above its neighbouring chords, prolonged; a ratio of
    two lines is largest at an end of the cell or where the prolonged chords meet.
    """
    x = np.exp(new.epsilons)
    ends = (new.upper - old.lower) / (1 + x)
    highest: Array = np.maximum(ends[:-1], ends[1:])
    for i in range(len(highest)):
        meeting, least = _lowest_corner(old, x, i)
        share = (meeting - x[i]) / (x[i + 1] - x[i])
        chord = (1 - share) * new.upper[i] + share * new.upper[i + 1]
        highest[i] = max(highest[i], (chord - least) / (1 + meeting))
    return highest


def _lowest_corner(curve: _Bounds, x: Array, i: int) -> tuple[float, float]:
    """Where in cell i of x = e^eps the curve may dip most below its chord: (x, lower bound on delta there)."""
    if i == 0:  # the curve's reflection: delta(-eps) = 1 - e^-eps (1 - delta(eps))
        before, above = 1 / x[1], 1 - (1 - curve.upper[1]) / x[1]
    else:
        before, above = x[i - 1], curve.upper[i - 1]
    left = (curve.lower[i] - above) / (x[i] - before)
    right = min(0.0, (curve.upper[i + 2] - curve.lower[i + 1]) / (x[i + 2] - x[i + 1])) if i + 2 < len(x) else 0.0
    # The lines through (x_i, lower_i) and (x_i+1, lower_i+1) with these slopes.
    drop = curve.lower[i] - curve.lower[i + 1] + right * (x[i + 1] - x[i])
    meeting = x[i] + (drop / (right - left) if right > left else 0.0)
    meeting = float(min(max(meeting, x[i]), x[i + 1]))
    least = max(curve.lower[i] + left * (meeting - x[i]), curve.lower[i + 1] + right * (meeting - x[i + 1]))
    return meeting, float(least)
