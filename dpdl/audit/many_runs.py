"""A lower bound on epsilon from many runs, each with or without one example.

    def run(present):                 # trains on the data with or without the canary
        ...
        return {"loss": -loss_on_canary}

    result = audit_many_runs(run, runs=500, delta=1e-5, claimed_epsilon=3.0)

A test "score above threshold" tells the two kinds of run apart with some false positive and false negative rate.
Statistic and threshold are chosen on the first half of the runs; on the second half the errors are counted, and
Clopper and Pearson's limits of both rates, each of half of the failure probability, give the bound (`bounds`). With n
runs of a kind counted, no epsilon above log(n / 4) or so can be seen, unless a curve is assumed.

The relation is that of the two data sets: with the example and without it is add or remove.

References:
    Jagielski, Ullman, Oprea, Auditing Differentially Private Machine Learning, 2020. arXiv:2006.07709
    Nasr et al., Tight Auditing of Differentially Private Machine Learning, 2023. arXiv:2302.07956
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accountants import NeighboringRelation
from dpdl.audit.bounds import epsilon_of_rates, rate_at_most
from dpdl.audit.curves import CurveName, family_of, relation_of
from dpdl.audit.power import note_on_power, runs_see
from dpdl.audit.result import AuditResult
from dpdl.errors import ParameterError
from dpdl.plan import PrivacyPlan

__all__ = ["audit_many_runs", "bound_from_runs", "with_power_of_runs"]

Array = NDArray[np.float64]

_FEWEST = 20  # runs of a kind: half of them choose, and of ten no test can be counted on
_THRESHOLDS = 100


def audit_many_runs(
    run: Callable[[bool], Mapping[str, float] | float],
    *,
    runs: int = 200,
    delta: float,
    confidence: float = 0.95,
    claimed_epsilon: float | None = None,
    curve: PrivacyPlan | CurveName = "any",
    relation: NeighboringRelation | str | None = None,
) -> AuditResult:
    """Run with and without, and bound epsilon from how well the two can be told apart.

    Args:
        run: with the example (True) or without it (False), from scratch and with randomness of its own: to a score, or
            several by name; higher is rather with, or rather without, but the same way in all runs.
        runs: of each kind, >= 20.
        delta: in (0, 1), of the bound and the claim.
        confidence: in (0, 1).
        claimed_epsilon: to hold the bound against.
        curve: "any" assumes nothing; "gaussian", or the plan, is stronger, and an assumption: see
            `dpdl.audit.curves`.
        relation: what the two kinds of run differ in, if `run` does not add or remove the example; by default the
            plan's, if `curve` is one.

    Returns:
        The bound.

    Guarantee:
        At most a share of 1 - confidence of such audits gives a bound above epsilon, if runs are independent.

    Raises:
        ParameterError: a number is out of range, or a score is NaN.

    References:
        Jagielski, Ullman, Oprea, 2020. arXiv:2006.07709; Nasr et al., 2023. arXiv:2302.07956 (the module has both).
    """
    if not isinstance(runs, int) or runs < _FEWEST:
        raise ParameterError(f"runs must be a whole number >= {_FEWEST}, got {runs!r}.")
    seen: dict[bool, list[Mapping[str, float]]] = {True: [], False: []}
    for _ in range(runs):
        for present, scores in seen.items():
            scored = run(present)
            scores.append(scored if isinstance(scored, Mapping) else {"score": float(scored)})
    with_it, without = ({name: np.array([s[name] for s in each]) for name in each[0]} for each in seen.values())
    found = bound_from_runs(
        with_it,
        without,
        delta=delta,
        confidence=confidence,
        claimed_epsilon=claimed_epsilon,
        curve=curve,
        relation=relation,
    )
    what = f"{runs} runs of each kind"
    return with_power_of_runs(found, what, trials=runs - runs // 2, curve=curve, plan=None, ideal=True)


def bound_from_runs(
    with_it: Mapping[str, Array],
    without: Mapping[str, Array],
    *,
    delta: float,
    confidence: float,
    claimed_epsilon: float | None = None,
    curve: PrivacyPlan | CurveName = "any",
    attack: str = "many runs",
    relation: NeighboringRelation | str | None = None,
) -> AuditResult:
    """As `audit_many_runs`, from scores that are there already.

    Args:
        with_it, without: scores of runs with and without the example, by statistic, shapes [n] and [m], in an order
            that does not depend on them.
        delta, confidence, claimed_epsilon, curve, relation: as in `audit_many_runs`.
        attack: what to call it.

    Raises:
        ParameterError: a number is out of range, a score is NaN, or there are too few.
    """
    if not 0 < confidence < 1:
        raise ParameterError(f"confidence must be in (0, 1), got {confidence!r}.")
    if not 0 < delta < 1:
        raise ParameterError(f"delta must be in (0, 1), got {delta!r}.")
    _refuse_scores(with_it, without)
    pair = relation_of(curve) if relation is None else NeighboringRelation.of(relation)
    family = family_of(curve)
    failure = (1 - confidence) / 2

    def limits(name: str, sign: int, threshold: float, half: int) -> tuple[float, float, dict[str, int]]:
        """Upper limits of FPR and FNR of "sign x score > threshold", on the first (0) or second half (1)."""
        yes, no = sign * _half(with_it[name], half), sign * _half(without[name], half)
        alarms, misses = int((no > threshold).sum()), int((yes <= threshold).sum())
        counts = {"false_positives": alarms, "of_without": len(no), "false_negatives": misses, "of_with": len(yes)}
        return rate_at_most(alarms, len(no), failure=failure), rate_at_most(misses, len(yes), failure=failure), counts

    best, chosen = -math.inf, (next(iter(with_it)), 1, 0.0)
    for name in with_it:
        for sign in (1, -1):
            for threshold in _thresholds(sign * _half(with_it[name], 0), sign * _half(without[name], 0)):
                fpr, fnr, _ = limits(name, sign, threshold, 0)
                found = epsilon_of_rates(fpr, fnr, delta=delta) if family is None else family.merit(fpr, fnr)
                if found > best:
                    best, chosen = found, (name, sign, threshold)
    fpr, fnr, counts = limits(*chosen, 1)
    if family is None:
        lower, refuted = epsilon_of_rates(fpr, fnr, delta=delta), False
    else:
        strength = family.strongest(lambda each: each.least_fpr(1 - fnr) > fpr, above=0.0)
        lower, refuted = family.epsilon(strength, delta=delta), family.refutes(claimed_epsilon, strength, delta=delta)
    details: dict[str, Any] = {
        "statistic": chosen[0],
        "threshold": chosen[1] * chosen[2],
        "with_it_is": "higher" if chosen[1] == 1 else "lower",
        "fpr_at_most": fpr,
        "fnr_at_most": fnr,
        **counts,
        "curve": "plan" if isinstance(curve, PrivacyPlan) else curve,
    }
    return AuditResult(
        attack=attack,
        epsilon_lower=lower,
        delta=delta,
        relation=pair.value,
        confidence=confidence,
        claimed_epsilon=claimed_epsilon,
        claim_refuted=refuted,
        details=details,
        assumptions=(
            "the runs were independent, and differed in the one example only",
            *(() if family is None else (family.assumption,)),
        ),
    )


def with_power_of_runs(
    found: AuditResult,
    what: str,
    *,
    trials: int,
    curve: PrivacyPlan | CurveName,
    plan: PrivacyPlan | None,
    ideal: bool = False,
) -> AuditResult:
    """With a note on which missing noise would have been seen, if there is a claim.

    Args:
        found: of `bound_from_runs`.
        what: was looked at, in words.
        trials: of either kind, counted.
        curve: as in the audit.
        plan: of the training, if `curve` is not it.
        ideal: as in `note_on_power`.
    """
    claim = found.claimed_epsilon
    if claim is None or math.isinf(claim):
        return found
    note = note_on_power(
        runs_see(curve, epsilon=claim, delta=found.delta, trials=trials, confidence=found.confidence),
        what=what,
        plan=curve if isinstance(curve, PrivacyPlan) else plan,
        epsilon=claim,
        delta=found.delta,
        ideal=ideal,
    )
    return replace(found, notes=(*found.notes, note))


def _half(values: Array, half: int) -> Array:
    middle = len(values) // 2
    return values[:middle] if half == 0 else values[middle:]


def _thresholds(yes: Array, no: Array) -> Array:
    """Between neighbouring values of both kinds together; not at one, where rounding would decide."""
    values: Array = np.unique(np.concatenate([yes, no]))
    middles: Array = (values[:-1] + values[1:]) / 2 if len(values) > 1 else values
    if len(middles) <= _THRESHOLDS:
        return middles
    chosen: Array = middles[np.linspace(0, len(middles) - 1, _THRESHOLDS).astype(int)]
    return chosen


def _refuse_scores(with_it: Mapping[str, Array], without: Mapping[str, Array]) -> None:
    if set(with_it) != set(without) or not with_it:
        raise ParameterError(f"Both kinds of run need the same scores, got {sorted(with_it)} and {sorted(without)}.")
    for name in with_it:
        for values in (with_it[name], without[name]):
            if values.ndim != 1 or len(values) < _FEWEST or np.isnan(values).any():
                raise ParameterError(
                    f"'{name}' must be {_FEWEST} numbers or more for each kind of run, got shape {values.shape}"
                    f"{' with NaN' if np.isnan(values).any() else ''}."
                )
