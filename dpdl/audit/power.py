"""Which missing noise an audit would have seen: what its finding nothing is worth.

    seen = runs_see("gaussian", epsilon=3.0, delta=1e-5, trials=250, confidence=0.95)   # does a count refute the claim?
    note_on_power(seen, what="1000 canaries", plan=plan, epsilon=3.0, delta=1e-5)

A note on power is about the audit only. It is no part of the bound, and none of the guarantee: that of a correct
training holds whatever was seen.

The rates are exact, of two of the statistics that white-box audits look at, the sum of a canary's moves and the
largest one. A canary is in each of T batches with probability q, and its move is then 1, else 0, plus Gaussian noise
of standard deviation s in units of the clipping norm:

    sum        in: Binomial(T, q) + N(0, T s^2)                      out: N(0, T s^2)
    largest    in: P[at most t] = ((1 - q) Phi(t/s) + q Phi((t - 1)/s))^T     out: Phi(t/s)^T

Seldom sampled, both see far less than the Gaussian curve through the same (epsilon, delta) would let them: at a small
delta epsilon is about an example that was in unusually many batches, of which no audit sees enough.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from dpdl.audit.bounds import epsilon_of_rates, mu_of_epsilon, rate_at_most
from dpdl.audit.curves import Curve, CurveName, PlanCurves, family_of
from dpdl.plan import PrivacyPlan

__all__ = [
    "POWER",
    "Leak",
    "Rates",
    "curve_of_claim",
    "guesses_see",
    "leak_of",
    "least_shortfall",
    "note_on_power",
    "runs_see",
]

Array = NDArray[np.float64]

POWER = 0.9  # with which a leak is called visible
_GROSS = 2.0  # an audit that does not see halved noise sees gross faults only
_FACTORS = [1.02**n for n in range(1, 106)]  # of missing noise: up to 8
_LEVELS = np.linspace(-4.0, 7.0, 221)  # thresholds, by the false positive rate: a normal quantile
_EVERY = 5  # of these, where each costs a bound
_LARGEST_CLAIM = 64.0  # no audit refutes more


@dataclass(frozen=True, eq=False)
class Rates:
    """Of the tests "score above t", t rising along the arrays: both error rates, falling and rising."""

    false_positives: Array
    false_negatives: Array


Leak = Callable[[float], list[Rates]]  # by the factor that the noise is smaller than claimed
Sees = Callable[[list[Rates]], bool]


def leak_of(plan: PrivacyPlan | None, *, epsilon: float, delta: float) -> Leak:
    """Tests of one canary: under the plan, or, without, of the Gaussian curve through the claim."""
    if plan is not None:
        return lambda factor: _of_plan(plan, factor)
    mu = mu_of_epsilon(epsilon, delta=delta)
    return lambda factor: [Rates(special.ndtr(-_LEVELS), special.ndtr(_LEVELS - factor * mu))]


def least_shortfall(leak: Leak, sees: Sees) -> float | None:
    """The least factor k, up to 8 and rounded up by 2%, such that noise of 1/k of the claimed is seen; or None."""
    first = bisect.bisect_left(_FACTORS, True, key=lambda factor: sees(leak(factor)))
    return _FACTORS[first] if first < len(_FACTORS) else None


def runs_see(curve: PrivacyPlan | CurveName, *, epsilon: float, delta: float, trials: int, confidence: float) -> Sees:
    """Whether errors counted in so many independent trials of either kind refute the claim, with probability 90%."""
    claimed = curve_of_claim(curve, epsilon, delta=delta)
    failure, miss = (1 - confidence) / 2, (1 - POWER) / 2

    def limits(rates: Array) -> list[float]:
        return [rate_at_most(most, trials, failure=failure) for most in _most(rates, trials, miss=miss).tolist()]

    def sees(tests: list[Rates]) -> bool:
        pairs = [
            pair
            for each in tests
            for pair in zip(limits(each.false_positives[::_EVERY]), limits(each.false_negatives[::_EVERY]), strict=True)
        ]
        if claimed is None:
            return any(epsilon_of_rates(*pair, delta=delta) > epsilon for pair in pairs)
        return any(claimed.least_fpr(1 - fnr) > fpr for fpr, fnr in pairs)

    return sees if trials >= 1 else lambda tests: False


def guesses_see(
    refuted: Callable[[int, int], bool], *, candidates: int, shares: tuple[tuple[float, float], ...]
) -> Sees:
    """Whether guesses about the coins of one run refute the claim, with probability 90%.

    Args:
        refuted: (right guesses, guesses) to whether they do.
        candidates: coins.
        shares: of the candidates, those guessed "in" and "out", in each test.
    """

    def sees(tests: list[Rates]) -> bool:
        for each in tests:
            found = 1 - each.false_negatives, each.false_positives  # of those in and those out: above the threshold
            missed = 1 - each.false_positives, each.false_negatives  # of those out and those in: below
            for share_in, share_out in shares:
                guessed_in, guessed_out = math.floor(share_in * candidates), math.floor(share_out * candidates)
                wrong = guessed_in * _wrong(*found, share_in) + guessed_out * _wrong(*missed, share_out)
                guesses = guessed_in + guessed_out
                if guesses:
                    errors = int(_most(np.array([wrong / guesses]), guesses, miss=1 - POWER)[0])
                    if refuted(guesses - errors, guesses):
                        return True
        return False

    return sees


def curve_of_claim(curve: PrivacyPlan | CurveName, epsilon: float, *, delta: float) -> Curve | None:
    """The curve that an audit must refute to refute the claim; None of "any", which has an (epsilon, delta) only."""
    family = family_of(curve)
    if family is None:
        return None
    return family.curve(_strength(curve, epsilon, delta=delta))


def _strength(curve: PrivacyPlan | CurveName, epsilon: float, *, delta: float) -> float:
    """The claim's in its family."""
    if not isinstance(curve, PrivacyPlan):
        return mu_of_epsilon(epsilon, delta=delta)
    family, planned = PlanCurves(curve), 1 / curve.noise_multiplier
    low, high = planned / _FACTORS[-1], planned * _FACTORS[-1]
    if family.refutes(epsilon, planned, delta=delta):  # as a rule the claim is the plan's own
        return planned
    while high / low > 1 + 1e-3:
        middle = math.sqrt(low * high)
        refuted = family.refutes(epsilon, middle, delta=delta) or family.epsilon(middle, delta=delta) > epsilon
        low, high = (low, middle) if refuted else (middle, high)
    return high


def note_on_power(
    sees: Sees, *, what: str, plan: PrivacyPlan | None, epsilon: float, delta: float, ideal: bool = False
) -> str:
    """Which missing noise would have been seen, in words.

    Args:
        sees: whether rates are seen: `runs_see` or `guesses_see`.
        what: was looked at: "1000 canaries".
        plan: of the training; None if it is not known.
        epsilon, delta: the claim; epsilon finite.
        ideal: whether the attacker may see less than the rates say: who sees the final model only, say.

    Raises:
        ParameterError: a number is out of range.
    """
    factor = None
    if epsilon <= _LARGEST_CLAIM:
        factor = least_shortfall(leak_of(plan, epsilon=epsilon, delta=delta), sees)
    least = _FACTORS[-1] if factor is None else factor
    shown = f"noise of {1 / least:.0%} of what was claimed, or less, would have been seen with probability {POWER:.0%}"
    if factor is None:
        shown = f"not even {shown.replace(', or less,', '')}"
    if ideal:
        shown += ", by a score that tells as much as the sum of all steps; a weaker one sees less"
    if plan is None:
        shown += ", if every step is on all of the data; of sampled steps less is seen: give the plan to know"
    if factor is None or factor > _GROSS:
        shown += (
            ". This audit could have seen only gross faults: take more canaries "
            "or runs, a plan with a higher sampling rate, or one with a smaller epsilon"
        )
    return f"{what}: {shown}"


def _of_plan(plan: PrivacyPlan, factor: float) -> list[Rates]:
    q, steps, noise = plan.sample_rate, plan.steps, plan.noise_multiplier / factor
    outside = special.ndtr(-_LEVELS)
    middle, reach = steps * q, 8 * math.sqrt(steps * q * (1 - q)) + 30  # all but 1e-12 of the batches it is in
    batches = np.arange(max(0, math.floor(middle - reach)), min(steps, math.ceil(middle + reach)) + 1, dtype=float)
    choose = special.gammaln(steps + 1) - special.gammaln(batches + 1) - special.gammaln(steps - batches + 1)
    weights = np.exp(choose + special.xlogy(batches, q) + special.xlog1py(steps - batches, -q))
    total = Rates(outside, special.ndtr(_LEVELS[:, None] - batches / (noise * math.sqrt(steps))) @ weights)
    threshold = -special.ndtri(-np.expm1(special.log_ndtr(_LEVELS) / steps))  # in units of a step's noise
    one = (1 - q) * special.ndtr(threshold) + q * special.ndtr(threshold - 1 / noise)
    return [total, Rates(outside, one**steps)]


def _most(rates: Array, trials: int, *, miss: float) -> Array:
    """The most errors that there are with probability 1 - miss; none if even one is rarer than that."""
    inside = np.clip(rates, 1e-300, 1 - 1e-12)
    errors = np.ceil(special.bdtrik(1 - miss, trials, inside))
    none = -np.expm1(trials * np.log1p(-inside)) <= miss
    found: Array = np.clip(np.where(none | np.isnan(errors), np.where(none, 0, trials), errors), 0, trials).astype(int)
    return found


def _wrong(right: Array, wrong: Array, share: float) -> float:
    """Of the given share of all canaries, half of which are in, those furthest out: how many are of the wrong kind."""
    guessed = (right + wrong) / 2
    at = int(np.argmin(np.abs(guessed - share)))
    return float(wrong[at] / max(right[at] + wrong[at], 1e-300))
