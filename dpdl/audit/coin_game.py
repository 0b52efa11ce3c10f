"""Scores against the fair coins that decided what was trained on: what turns an attack on examples into a bound.

A coin for each candidate decides whether a run gets it; the attacker sees what the run released and guesses as many
coins as it likes. Under (epsilon, delta) the number of right guesses has a bound, although all of them are about one
run [1, Theorem 5.2]; too many right ones refute the epsilon.

Several runs with coins of their own are one mechanism: a coin moves one run only, so that the same epsilon and delta
hold for all coins together. Scores of one run must then not depend on the coins of another that is counted too.

References:
    [1] Steinke, Nasr, Jagielski, Privacy Auditing with One (1) Training Run, 2023. arXiv:2305.08846
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from accountants import NeighboringRelation
from dpdl.audit.curves import CurveName
from dpdl.audit.one_run import bound_from_scores
from dpdl.audit.result import AuditResult
from dpdl.errors import ParameterError
from dpdl.plan import PrivacyPlan

__all__ = ["CoinGame"]

Array = NDArray[np.float64]
Coins = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class CoinGame:
    """Candidates with a score and a coin each.

    Attributes:
        scores: shape [n], the higher the more likely the coin is True. They may depend on what the runs released and on
            all that the attacker knows besides, never on the coins.
        coins: shape [n], bool: fair, independent of each other and of everything but the runs.
        relation: what a coin changes in the data of a run: the neighbouring relation of the bound, and of a claim.
        assumptions: what the bound rests on, besides the coins.

    Raises:
        ParameterError: shapes do not fit, or a score is NaN.
    """

    scores: Array
    coins: Coins
    relation: NeighboringRelation
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.scores.ndim != 1 or self.scores.shape != self.coins.shape or self.coins.dtype != np.bool_:
            raise ParameterError(
                f"scores and coins must be [n] floats and [n] bools, got shapes {self.scores.shape} and "
                f"{self.coins.shape}, {self.coins.dtype}."
            )
        if not len(self.coins) or np.isnan(self.scores).any():
            raise ParameterError("A game needs candidates, and scores that are numbers. Give an unknown score 0.")

    def audit(
        self,
        *,
        attack: str,
        delta: float,
        confidence: float,
        claimed_epsilon: float | None = None,
        curve: PrivacyPlan | CurveName = "any",
    ) -> AuditResult:
        """Guess, count, and bound epsilon from below.

        Args:
            attack: what to call it.
            delta: of the bound and the claim, in (0, 1).
            confidence: of the bound, in (0, 1).
            claimed_epsilon: an upper bound at `delta` for `relation`, to be held against.
            curve: as in `dpdl.audit.audit_one_run`; a plan is taken with the relation of the game.

        Returns:
            The bound; 0 if the guesses refute nothing.

        Raises:
            ParameterError: a number is out of range.
        """
        if isinstance(curve, PrivacyPlan):
            curve = replace(curve, relation=self.relation.value)
        return bound_from_scores(
            {"score": self.scores},
            self.coins,
            attack=attack,
            delta=delta,
            confidence=confidence,
            claimed_epsilon=claimed_epsilon,
            curve=curve,
            assumptions=(*self.assumptions, f"the claim is about {self.relation.phrase}"),
            relation=self.relation,
        )
