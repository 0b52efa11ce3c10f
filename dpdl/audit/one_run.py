"""A lower bound on epsilon from one training run with many canaries.

    canaries = Canaries.with_fair_coins(*mislabelled(x_extra, y_extra, classes=10))

    def train(dataset):                                   # your training code, as it is
        ...
        return model

    def score(model, examples, labels):                   # higher: rather in the data
        return -F.cross_entropy(model(examples), labels, reduction="none")

    result = audit_one_run(train, canaries, score, dataset=dataset, delta=1e-5, claimed_epsilon=3.0)

With `GradientCanaries` in place of examples the same is done in white box: `audit_gradients`.

How a score becomes a bound: of the canaries, those with the highest scores are guessed to be in, those with the lowest
to be out, the others not at all. How many, is fixed beforehand: a few pairs of shares (`SHARES`), and the failure
probability is divided by their number. Right guesses are counted, and held against (epsilon, delta) [1] or against a
trade-off curve (`one_run_trade_off`).

References:
    [1] Steinke, Nasr, Jagielski, Privacy Auditing with One (1) Training Run, 2023. arXiv:2305.08846
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from accountants import NeighboringRelation
from dpdl.audit.bounds import one_run_epsilon, one_run_p_value
from dpdl.audit.canaries import Canaries
from dpdl.audit.curves import CurveName, Family, family_of, relation_of
from dpdl.audit.gradient_canaries import GradientCanaries
from dpdl.audit.many_runs import bound_from_runs, with_power_of_runs
from dpdl.audit.one_run_trade_off import one_run_refutes
from dpdl.audit.power import curve_of_claim, guesses_see, note_on_power
from dpdl.audit.result import AuditResult
from dpdl.audit.transcript import Transcript, statistics_of
from dpdl.errors import ParameterError
from dpdl.plan import PrivacyPlan

__all__ = [
    "EMPTY_PLACES",
    "SHARES",
    "audit_gradients",
    "audit_one_run",
    "bound_from_canaries_as_runs",
    "bound_from_scores",
]

Array = NDArray[np.float64]
Coins = NDArray[np.bool_]
Trained = TypeVar("Trained")

# Of the canaries: guessed "in", guessed "out". Many guesses see a weak leak, few a strong one that is seen rarely, as
# of an example that is in few batches; "out" alone sees canaries that are in too often.
SHARES = ((0.01, 0.01), (0.05, 0.05), (0.1, 0.1), (0.25, 0.25), (0.5, 0.5), (0.05, 0.0), (0.0, 0.25))

_FAIR = "the coins were fair, independent, and unknown to whoever trained and scored"
EMPTY_PLACES = "an example without gradient stands for one that is not there"
_INDEPENDENT = "what happened to one canary was independent of what happened to another"


def audit_one_run(
    train: Callable[[Dataset[Any]], Trained],
    canaries: Canaries,
    score: Callable[[Trained, Tensor, Tensor], Tensor],
    *,
    dataset: Dataset[Any],
    delta: float,
    confidence: float = 0.95,
    claimed_epsilon: float | None = None,
    curve: PrivacyPlan | CurveName = "any",
) -> AuditResult:
    """Train once with canaries, and bound epsilon from how well their scores tell who was in. Black box.

    Args:
        train: from a data set to whatever is released: a model, or a file's name.
        canaries: with their coins.
        score: (what `train` returned, all examples, all labels) to shape [m]: the higher, the rather it was in. It is
            given no coins.
        dataset: the private data, without canaries, as `train` takes it.
        delta: in (0, 1), of the bound and the claim.
        confidence: in (0, 1).
        claimed_epsilon: to hold the bound against.
        curve: "any" assumes nothing; "gaussian", or the plan, is stronger, and an assumption: see
            `dpdl.audit.curves`.

    Returns:
        The bound.

    Guarantee:
        At most a share of 1 - confidence of such audits gives a bound above epsilon, if the coins were fair and
        unknown to `train` and `score`, for adding or removing one example (or any relation that covers it).

    Raises:
        ParameterError: a number is out of range, or the scores are not m numbers.

    References:
        Steinke, Nasr, Jagielski, 2023 (the module has it). arXiv:2305.08846
    """
    scores = score(train(canaries.joined(dataset)), canaries.examples, canaries.labels)
    found = bound_from_scores(
        {"score": scores.detach().cpu().double().numpy()},
        canaries.coins.cpu().numpy(),
        attack="one run, black box",
        delta=delta,
        confidence=confidence,
        claimed_epsilon=claimed_epsilon,
        curve=curve,
    )
    return _with_power_of_guesses(found, canaries.coins.numel(), curve=curve, plan=None, statistics=1, ideal=True)


def audit_gradients(
    train: Callable[[GradientCanaries, Dataset[Any]], object],
    canaries: GradientCanaries,
    *,
    dataset: Dataset[Any],
    delta: float,
    confidence: float = 0.95,
    claimed_epsilon: float | None = None,
    curve: PrivacyPlan | CurveName = "any",
    independent: bool = False,
    plan: PrivacyPlan | None = None,
) -> AuditResult:
    """Train once with gradient canaries, and bound epsilon from what each step did to their weights. White box.

    Args:
        train: given the model with the canaries in it, and the data with the included canaries in it. It trains that
            very model, by any code; what it returns is not used.
        canaries: the model with its canaries.
        dataset: the private data, without canaries.
        delta, confidence, claimed_epsilon, curve: as in `audit_one_run`.
        independent: count each canary as a run of its own. It is far stronger, and an assumption: that what happens
            to one canary (sampling, noise) is independent of what happens to another, as Poisson sampling and
            independent Gaussian noise are.
        plan: of the training, if `curve` is not it: for the note on power only, which depends on how seldom examples
            are drawn.

    Returns:
        The bound, from the best of four statistics of the steps; with the confidence stated for all of them. Of a
        claim, a note says which missing noise would have been seen.

    Guarantee:
        As of `audit_one_run`.

    Raises:
        ParameterError: a number is out of range.
        StepError: the training moved another model's weights.

    References:
        Steinke, Nasr, Jagielski, 2023 (the module has it). arXiv:2305.08846
    """
    with Transcript([canaries.watched]) as seen:
        train(canaries, canaries.joined(dataset))
    moves, coins = seen.moves[:, :-1], canaries.coins.numpy()
    # The spread is of canaries that, counted as runs, only choose the test.
    scores = statistics_of(moves, reference=moves[:, : max(1, len(coins) // 4)])
    attack = "one run, white box"
    if independent:
        found = bound_from_canaries_as_runs(
            {name: (values, coins) for name, values in scores.items()},
            attack=attack,
            delta=delta,
            confidence=confidence,
            claimed_epsilon=claimed_epsilon,
            curve=curve,
            assumptions=(EMPTY_PLACES,),
        )
        return with_power_of_runs(
            found, f"{len(coins)} canaries", trials=len(coins) // 4, curve=curve, plan=plan
        )  # half of them are counted, half of those are in
    found = bound_from_scores(
        scores,
        coins,
        attack=attack,
        delta=delta,
        confidence=confidence,
        claimed_epsilon=claimed_epsilon,
        curve=curve,
        assumptions=(EMPTY_PLACES,),
    )
    return _with_power_of_guesses(found, len(coins), curve=curve, plan=plan, statistics=len(scores))


def bound_from_canaries_as_runs(
    scores: Mapping[str, tuple[Array, Coins]],
    *,
    attack: str,
    delta: float,
    confidence: float,
    claimed_epsilon: float | None = None,
    curve: PrivacyPlan | CurveName = "any",
    assumptions: tuple[str, ...] = (),
) -> AuditResult:
    """A bound from scores of canaries that are taken to be independent of each other.

    Args:
        scores: by the name of the statistic, scores and coins, shape [n] each, in an order that depends on neither.
        attack, delta, confidence, claimed_epsilon, curve: as in `audit_one_run`.
        assumptions: more than those about coins, curve and independence.

    Returns:
        As of `bound_from_runs`.

    Raises:
        ParameterError: a number is out of range, or there are too few canaries.
    """
    found = bound_from_runs(
        {name: values[coins] for name, (values, coins) in scores.items()},
        {name: values[~coins] for name, (values, coins) in scores.items()},
        delta=delta,
        confidence=confidence,
        claimed_epsilon=claimed_epsilon,
        curve=curve,
        attack=f"{attack}, canaries as runs",
    )
    of_curve = found.assumptions[1:]  # the first is about runs
    return replace(found, assumptions=(_FAIR, _INDEPENDENT, *of_curve, *assumptions))


def bound_from_scores(
    scores: Mapping[str, Array],
    coins: Coins,
    *,
    attack: str,
    delta: float,
    confidence: float,
    claimed_epsilon: float | None = None,
    curve: PrivacyPlan | CurveName = "any",
    assumptions: tuple[str, ...] = (),
    relation: NeighboringRelation | None = None,
) -> AuditResult:
    """A bound from scores that one run, or several with coins of their own, gave to candidates.

    Args:
        scores: by the name of the statistic, shape [m] each; the higher, the rather the coin is True.
        coins: shape [m], bool.
        attack, delta, confidence, claimed_epsilon, curve: as in `audit_one_run`.
        assumptions: more than those about coins and curve.
        relation: what a coin changes in the data; by default the plan's, if `curve` is one, else adding or removing.

    Returns:
        The best bound over statistics and shares, at the confidence stated for all of them together.

    Raises:
        ParameterError: a number is out of range, or shapes do not fit.
    """
    if not 0 < confidence < 1:
        raise ParameterError(f"confidence must be in (0, 1), got {confidence!r}.")
    if not 0 < delta < 1:
        raise ParameterError(f"delta must be in (0, 1), got {delta!r}.")
    for name, values in scores.items():
        if values.shape != coins.shape or coins.ndim != 1 or np.isnan(values).any():
            raise ParameterError(
                f"'{name}' must be {coins.size} numbers, one a canary, got shape {values.shape}"
                f"{' with NaN' if np.isnan(values).any() else ''}. Give an unknown score 0."
            )
    family = family_of(curve)
    tests = {
        (name, shares): _counted(values, coins, *shares)
        for name, values in scores.items()
        for shares in SHARES
        if any(int(share * coins.size) for share in shares)
    }
    failure = (1 - confidence) / max(1, len(tests))
    best, by = 0.0, None
    for test, (right, guesses) in tests.items():
        strength = _strength(right, guesses, coins.size, family, delta=delta, failure=failure, above=best)
        if strength > best:
            best, by = strength, test
    lower = best if family is None else family.epsilon(best, delta=delta)
    right, guesses = tests[by] if by is not None else (0, 0)
    details: dict[str, Any] = {
        "canaries": coins.size,
        "included": int(coins.sum()),
        "guesses": guesses,
        "right": right,
        "statistic": None if by is None else by[0],
        "shares_guessed_in_and_out": None if by is None else list(by[1]),
        "tests": len(tests),
        "curve": "plan" if isinstance(curve, PrivacyPlan) else curve,
    }
    return AuditResult(
        attack=attack,
        epsilon_lower=lower,
        delta=delta,
        relation=(relation or relation_of(curve)).value,
        confidence=confidence,
        claimed_epsilon=claimed_epsilon,
        claim_refuted=family is not None and family.refutes(claimed_epsilon, best, delta=delta),
        details=details,
        assumptions=(
            _FAIR,
            *(() if family is None else (family.assumption,)),
            *assumptions,
        ),
    )


def _strength(
    right: int, guesses: int, candidates: int, family: Family | None, *, delta: float, failure: float, above: float
) -> float:
    """The strongest leak that the guesses refute, at least `above`: an epsilon if there is no family."""
    if not 2 * right > guesses:  # no better than coins
        return above
    if family is None:
        return max(above, one_run_epsilon(right, guesses, candidates, delta=delta, confidence=1 - failure))
    return family.strongest(
        lambda curve: one_run_refutes(right, guesses, candidates, curve=curve, failure=failure), above=above
    )


def _with_power_of_guesses(
    found: AuditResult,
    candidates: int,
    *,
    curve: PrivacyPlan | CurveName,
    plan: PrivacyPlan | None,
    statistics: int,
    ideal: bool = False,
) -> AuditResult:
    """With a note on which missing noise would have been seen, if there is a claim."""
    claim = found.claimed_epsilon
    if claim is None or math.isinf(claim):
        return found
    shares = tuple(each for each in SHARES if any(int(share * candidates) for share in each))
    failure = (1 - found.confidence) / max(1, statistics * len(shares))
    claimed = curve_of_claim(curve, claim, delta=found.delta)

    def refuted(right: int, guesses: int) -> bool:
        if claimed is None:
            return one_run_p_value(right, guesses, candidates, epsilon=claim, delta=found.delta) <= failure
        return one_run_refutes(right, guesses, candidates, curve=claimed, failure=failure)

    note = note_on_power(
        guesses_see(refuted, candidates=candidates, shares=shares),
        what=f"{candidates} canaries",
        plan=curve if isinstance(curve, PrivacyPlan) else plan,
        epsilon=claim,
        delta=found.delta,
        ideal=ideal,
    )
    return replace(found, notes=(*found.notes, note))


def _counted(scores: Array, coins: Coins, share_in: float, share_out: float) -> tuple[int, int]:
    """Right guesses, and all: the highest scores "in", the lowest "out"; of equal ones, whoever was listed first."""
    order = np.argsort(scores, kind="stable")
    lowest, highest = (
        order[: math.floor(share_out * len(order))],
        order[len(order) - math.floor(share_in * len(order)) :],
    )
    return int((~coins[lowest]).sum() + coins[highest].sum()), len(lowest) + len(highest)
