"""LiRA: a likelihood ratio for each example, from models that had it and models that had not [1].

    found = lira(train_shadow_models(train, x, y, models=16))
    print(found)
    print(found.to_audit(delta=1e-5, claimed_epsilon=3.0))

How sure a model is of an example depends on the example far more than on membership. So for each example two normal
distributions are fitted to the confidences of shadow models, with and without it, and a target model's confidence is
judged by the ratio of the two (online). Without models that had it, it is judged by how far it lies above those that
had not (offline): cheaper for the attacker, and weaker.

Every shadow model is attacked with all the others: that gives the ROC. For the bound on epsilon some models stand apart
as targets and the others as shadows, because the guesses must not depend on any coin that is guessed: with each model
in both roles, two runs whose attacks copy each other's coins would be counted twice.

References:
    [1] Carlini, Chien, Nasr, Song, Terzis, Tramer, Membership Inference Attacks From First Principles, 2022.
        arXiv:2112.03570, algorithm 1 (online), section VI (offline; global variance where there are few models).
    [2] Steinke, Nasr, Jagielski, Privacy Auditing with One (1) Training Run, 2023. arXiv:2305.08846.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from accountants import NeighboringRelation, arguments
from dpdl.audit.coin_game import CoinGame
from dpdl.audit.membership_result import MembershipResult
from dpdl.audit.shadow_models import ShadowModels
from dpdl.errors import ParameterError

__all__ = ["Variance", "Variant", "lira"]

Array = NDArray[np.float64]
Coins = NDArray[np.bool_]
Variant = Literal["online", "offline"]
Variance = Literal["auto", "global", "per_example"]

_MANY_MODELS = 64  # from here on each example's own variance is the better estimate [1, section VI-B]
_LEAST_STD = 1e-6  # of confidences, in nats: models that are all alike

_ASSUMPTIONS = (
    "coins decided, each on its own, which candidates a run got",
    "each run has the claimed guarantee whatever examples it gets: sampling rate, steps and noise do not follow them",
    "runs are independent of each other",
)


def lira(
    shadows: ShadowModels,
    *,
    variant: Variant = "online",
    variance: Variance = "auto",
    targets: int | None = None,
    confidence: float = 0.95,
) -> MembershipResult:
    """Attack every shadow model with all the others.

    Args:
        shadows: confidences and coins of at least four models.
        variant: "online" (models with and without each example) or "offline" (only those without).
        variance: "per_example"; "global", one for all examples; "auto": global below 64 models.
        targets: models that stand apart for `to_audit`; by default a quarter. At least 3 remain as shadows.
        confidence: of intervals, in (0, 1).

    Returns:
        Scores of all (model, example) pairs by membership, and the game that bounds epsilon.

    Guarantee:
        None: it is an attack. The bound of `to_audit` holds with its confidence, for adding or removing one example.

    Raises:
        ParameterError: an unknown variant or variance, or too many targets.

    References:
        Carlini et al., Membership Inference Attacks From First Principles, 2022. arXiv:2112.03570, algorithm 1 and
        section VI.
    """
    for name, value, known in (("variant", variant, Variant), ("variance", variance, Variance)):
        if value not in get_args(known):
            raise ParameterError(f"{name} must be one of {get_args(known)}, got {value!r}.")
    coins = shadows.members
    count = len(coins)
    apart = max(1, count // 4)
    if targets is not None:
        apart = arguments.positive_whole("targets", targets, remedy="Give the number of models that are attacked.")
    if count - apart < 3:
        raise ParameterError(f"targets must leave 3 of {count} models as shadows, got {apart}. Train more models.")
    per_example = variance == "per_example" or (variance == "auto" and count >= _MANY_MODELS)
    attack = _Attack(variant, per_example)

    scores, unknown = attack.leave_one_out(shadows.confidences, coins)
    # A target is known by nothing but what it released; shadows are known whole.
    kept = count - apart
    fitted = attack.fitted(shadows.confidences[:kept], coins[:kept])
    tested = np.stack([attack.scores(fitted, target) for target in shadows.confidences[kept:]])
    notes = [f"{count} shadow models, each attacked with all others; {variant}"]
    if unknown:
        notes.append(f"{unknown} of {coins.size} pairs have too few models with or without the example: score 0")
    return MembershipResult(
        attack=f"LiRA, {variant}",
        members=scores[coins],
        non_members=scores[~coins],
        confidence=confidence,
        game=CoinGame(
            scores=tested.ravel(),
            coins=coins[kept:].ravel(),
            relation=NeighboringRelation.ADD_OR_REMOVE,
            assumptions=_ASSUMPTIONS,
        ),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Normals:
    """Normal distributions of each example's confidence; all [n, queries], `known` [n]."""

    mean_in: Array
    std_in: Array
    mean_out: Array
    std_out: Array
    known: Coins


@dataclass(frozen=True)
class _Attack:
    variant: Variant
    per_example: bool

    def leave_one_out(self, confidences: Array, coins: Coins) -> tuple[Array, int]:
        """Scores [models, n] of each model by all others, and how many of them rest on nothing."""
        rows, unknown = [], 0
        for target in range(len(coins)):
            others = np.arange(len(coins)) != target
            fitted = self.fitted(confidences[others], coins[others])
            rows.append(self.scores(fitted, confidences[target]))
            unknown += int((~fitted.known).sum())
        return np.stack(rows), unknown

    def fitted(self, confidences: Array, coins: Coins) -> _Normals:
        mean_in, std_in, enough_in = self._fit(confidences, coins)
        mean_out, std_out, enough_out = self._fit(confidences, ~coins)
        known = enough_out if self.variant == "offline" else enough_in & enough_out
        return _Normals(mean_in, std_in, mean_out, std_out, known)

    def scores(self, fitted: _Normals, confidence: Array) -> Array:
        """One model's [n, queries] as log-likelihood ratios, or distances above the models without, [n]."""
        above = (confidence - fitted.mean_out) / fitted.std_out
        if self.variant == "offline":
            # Monotone in one minus the p-value of [1, section VI-A], and never rounded to 1.
            return np.where(fitted.known, above.mean(1), 0.0)
        below = (confidence - fitted.mean_in) / fitted.std_in
        ratio = (above**2 - below**2) / 2 + np.log(fitted.std_out) - np.log(fitted.std_in)
        return np.where(fitted.known, ratio.sum(1), 0.0)

    def _fit(self, confidences: Array, chosen: Coins) -> tuple[Array, Array, Coins]:
        """Mean and standard deviation over the chosen models, [n, queries], and of whom there are enough, [n]."""
        weights = chosen[:, :, None].astype(np.float64)
        count = weights.sum(0)  # [n, 1]
        mean = (weights * confidences).sum(0) / np.maximum(count, 1)
        squares = (weights * (confidences - mean) ** 2).sum(0)
        if self.per_example:
            std, enough = np.sqrt(squares / np.maximum(count - 1, 1)), count[:, 0] >= 2
        else:
            freedom = float(np.maximum(count - 1, 0).sum())
            pooled = np.sqrt(squares.sum(0) / max(freedom, 1.0))
            std, enough = np.broadcast_to(pooled, mean.shape), (count[:, 0] >= 1) & (freedom > 0)
        return mean, np.maximum(std, _LEAST_STD), enough
