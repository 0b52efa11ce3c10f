"""What a membership inference attack reached: the ROC, at low false positive rates above all.

    found = loss_threshold_attack(model, members=(x, y), non_members=(other_x, other_y))
    print(found)

An average (accuracy, AUC) hides what matters: an attack that is sure of ten people and knows nothing of all others is a
bad one by its AUC and a bad day for the ten. So the true positive rate at a false positive rate of 0.1% and 1% comes
first [1]. Rates are of the examples that were given; what the intervals assume is said where they are.

**A ROC is not an epsilon.** The examples of one trained model are one trial of the training, not many: nothing but
coins that decided membership makes a bound on epsilon of it. Where there were such coins, the result holds a game
(`CoinGame`) and `to_audit` gives an `AuditResult`; where there were none, it refuses.

Private: all of it, being measured on private examples.

References:
    [1] Carlini, Chien, Nasr, Song, Terzis, Tramer, Membership Inference Attacks From First Principles, 2022.
        arXiv:2112.03570, section IV.
    [2] Yeom, Giacomelli, Fredrikson, Jha, Privacy Risk in Machine Learning, 2018. arXiv:1709.01604, definition 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accountants import arguments
from dpdl.audit.bounds import clopper_pearson
from dpdl.audit.coin_game import CoinGame
from dpdl.audit.curves import CurveName
from dpdl.audit.result import AuditResult
from dpdl.audit.verdict import A_FAILURE_PROVES_NOTHING
from dpdl.errors import ParameterError
from dpdl.plan import PrivacyPlan

__all__ = ["LOW_RATES", "MembershipResult", "TruePositiveRate"]

Array = NDArray[np.float64]

LOW_RATES = (1e-3, 1e-2)  # false positive rates of [1]'s tables


@dataclass(frozen=True, kw_only=True)
class TruePositiveRate:
    """Members found, where at most a share `allowed` of the non-members is accused.

    Attributes:
        allowed: the false positive rate that was asked for.
        found, members: members above the threshold, of how many.
        accused, non_members: non-members above it, of how many.
        lower, upper: Clopper-Pearson interval of the true positive rate at this threshold, at `confidence`.
        confidence: of the interval.
    """

    allowed: float
    found: int
    members: int
    accused: int
    non_members: int
    lower: float
    upper: float
    confidence: float

    @property
    def tpr(self) -> float:
        """Share of the members that are found."""
        return self.found / self.members

    @property
    def fpr(self) -> float:
        """Share of the non-members that are accused: at most `allowed`."""
        return self.accused / self.non_members

    def __str__(self) -> str:
        return f"{self.tpr:.2%} [{self.lower:.2%}, {self.upper:.2%}] at a false positive rate of {self.allowed:g}"


@dataclass(frozen=True, kw_only=True, eq=False)
class MembershipResult:
    """Scores of members and of non-members, and what can be read off them.

    Attributes:
        attack: which one, in a few words.
        members: scores of examples that were trained on, shape [n], the higher the more like a member.
        non_members: scores of examples that were not, shape [m].
        confidence: of the intervals, in (0, 1).
        game: the coins that decided who is a member, if there were any: what `to_audit` needs.
        no_epsilon: why there is none otherwise, and what to do; a sentence.
        notes: what a reader should know besides.

    Guarantee:
        None: of one attack. It is no lower bound on epsilon, unless coins decided who was a member (`to_audit`).

    Raises:
        ParameterError: a score is NaN, there are none of a kind, or the confidence is not in (0, 1).
    """

    attack: str
    members: Array
    non_members: Array
    confidence: float = 0.95
    game: CoinGame | None = None
    no_epsilon: str = "Nobody drew coins that decided who is a member."
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("members", "non_members"):
            scores = arguments.reals(name, getattr(self, name), remedy="Leave examples without a score out.")
            if scores.ndim != 1 or not len(scores):
                raise ParameterError(f"{name} must be scores of shape [n], n >= 1, got shape {scores.shape}.")
            object.__setattr__(self, name, scores)
        if not 0 < self.confidence < 1:
            raise ParameterError(f"confidence must be in (0, 1), got {self.confidence}. Give for example 0.95.")

    def roc(self) -> tuple[Array, Array]:
        """All false and true positive rates that a threshold can reach, from (0, 0) to (1, 1).

        Returns:
            fpr and tpr, each of shape [k], non-decreasing. Equal scores are on one side of every threshold.
        """
        scores = np.concatenate([self.members, self.non_members])
        thresholds = np.unique(scores)[::-1]  # "score >= threshold" accuses
        return (
            np.concatenate([[0.0], _above(self.non_members, thresholds) / len(self.non_members)]),
            np.concatenate([[0.0], _above(self.members, thresholds) / len(self.members)]),
        )

    @property
    def auc(self) -> float:
        """The probability that a member scores above a non-member, equal scores counting half; 0.5 is chance."""
        fpr, tpr = self.roc()
        return float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))

    @property
    def advantage(self) -> float:
        """True minus false positive rate, of a threshold chosen on one half of the scores and measured on the other.

        Both ways round, and the mean of the two: the best threshold of all scores would flatter the attack [2]. Halves
        are every other score. In [-1, 1]; chance is 0, give or take.
        """
        halves = [(self.members[i::2], self.non_members[i::2]) for i in (0, 1)]
        if any(len(part) == 0 for half in halves for part in half):
            return math.nan
        (a, b), (c, d) = halves
        return (_advantage_of(_best_threshold(a, b), c, d) + _advantage_of(_best_threshold(c, d), a, b)) / 2

    def tpr_at(self, fpr: float) -> TruePositiveRate:
        """Members found by the lowest threshold that accuses at most a share `fpr` of the non-members.

        Args:
            fpr: in [0, 1].

        Returns:
            The rate with its interval. The interval takes the examples for independent draws and the threshold for
            given; it says how far other members would vary with *this* model, and nothing of other models.

        Raises:
            ParameterError: fpr is not in [0, 1].
        """
        allowed = float(arguments.probabilities("fpr", fpr, remedy="Give for example 0.01."))
        count = math.floor(allowed * len(self.non_members) * (1 + 1e-12))
        ordered = np.sort(self.non_members)[::-1]
        # Above the first score that must not be accused; with count == m nobody is left that must not.
        limit = ordered[count] if count < len(ordered) else -math.inf
        strict = np.greater if count < len(ordered) else np.greater_equal
        found, accused = int(strict(self.members, limit).sum()), int(strict(self.non_members, limit).sum())
        lower, upper = clopper_pearson(found, len(self.members), confidence=self.confidence)
        return TruePositiveRate(
            allowed=allowed,
            found=found,
            members=len(self.members),
            accused=accused,
            non_members=len(self.non_members),
            lower=lower,
            upper=upper,
            confidence=self.confidence,
        )

    def to_audit(
        self,
        *,
        delta: float,
        claimed_epsilon: float | None = None,
        confidence: float | None = None,
        curve: PrivacyPlan | CurveName = "any",
    ) -> AuditResult:
        """A lower bound on epsilon, where coins decided who is a member.

        Args:
            delta: of the bound and of the claim, in (0, 1).
            claimed_epsilon: an upper bound at that delta, for the game's neighbouring relation (`game.relation`).
            confidence: of the bound; by default the result's own.
            curve: "any" assumes nothing; "gaussian", or the plan, is stronger, and an assumption.

        Returns:
            The bound with its assumptions.

        Guarantee:
            With probability `confidence` over coins and training the bound is at most the true epsilon, if the
            assumptions hold that it lists.

        Raises:
            ParameterError: no coins decided who is a member: the scores bound no epsilon; or a number is out of range.
        """
        if self.game is None:
            raise ParameterError(
                f"{self.attack}: these scores bound no epsilon. {self.no_epsilon} Members of one model are one trial, "
                "not many. Use audit_one_run, or lira with shadow models, which draw coins."
            )
        return self.game.audit(
            attack=self.attack,
            delta=delta,
            claimed_epsilon=claimed_epsilon,
            confidence=self.confidence if confidence is None else confidence,
            curve=curve,
        )

    def __str__(self) -> str:
        rates = "; ".join(str(self.tpr_at(rate)) for rate in LOW_RATES)
        return (
            f"{self.attack}: true positive rate {rates}; AUC {self.auc:.3f}, advantage {self.advantage:.1%} "
            f"({len(self.members):,} members, {len(self.non_members):,} non-members, intervals at "
            f"{self.confidence:.0%}); {A_FAILURE_PROVES_NOTHING}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The rates as plain values, without the scores."""
        rates = [self.tpr_at(rate) for rate in LOW_RATES]
        return {
            "schema": "dpdl.membership/1",
            "summary": str(self),
            "attack": self.attack,
            "members": len(self.members),
            "non_members": len(self.non_members),
            "auc": self.auc,
            "advantage": None if math.isnan(self.advantage) else self.advantage,
            "confidence": self.confidence,
            "tpr_at_fpr": [
                {"allowed": r.allowed, "fpr": r.fpr, "tpr": r.tpr, "lower": r.lower, "upper": r.upper} for r in rates
            ],
            "notes": list(self.notes),
        }


def _above(scores: Array, thresholds: Array) -> Array:
    """How many scores are at or above each threshold, as floats."""
    return (len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")).astype(np.float64)


def _best_threshold(members: Array, non_members: Array) -> float:
    thresholds = np.unique(np.concatenate([members, non_members]))
    gains = _above(members, thresholds) / len(members) - _above(non_members, thresholds) / len(non_members)
    return float(thresholds[int(np.argmax(gains))])


def _advantage_of(threshold: float, members: Array, non_members: Array) -> float:
    return float((members >= threshold).mean() - (non_members >= threshold).mean())
