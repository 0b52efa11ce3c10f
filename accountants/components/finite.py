"""A mechanism with finitely many outcomes, each with its mass under either neighbour.

"remove" is (P, Q), "add" (Q, P). Losses are kept beside the masses, since a mass may be 0 as a double where the loss
is finite (epsilon = 1000).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from scipy import special

from accountants.components.atoms import Atoms
from accountants.components.component import Array, Component, Direction, LossPair
from accountants.components.small_differences import exp_remainder

_SLACK = 1e-12  # relative: added to every moment, above its rounding
_FAR = 0.5  # losses beyond this do not cancel in the mean of e^(t L) - 1
_OVERFLOW = 600.0  # exponents up to here are summed without logs


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One outcome.

    Attributes:
        p: mass under P.
        q: mass under Q.
        loss: log p / q; infinite only where one of the two laws has no mass at all.
    """

    p: float
    q: float
    loss: float


@dataclasses.dataclass(frozen=True)
class FiniteOutcomes(Component):
    """P and Q on finitely many outcomes; neighbours attain them.

    Attributes:
        outcomes: masses add up to 1 on either side; to have a pair, some outcome has mass on both.
        is_attained: whether some neighbours' laws are this pair; if not, it only dominates them.
    """

    outcomes: tuple[Outcome, ...]
    is_attained: bool = True

    def pair(self, direction: Direction) -> FinitePair:
        """The pair itself."""
        return FinitePair(self.outcomes if direction == "remove" else _reversed(self.outcomes))

    def witness(self, direction: Direction) -> FinitePair | None:
        """The pair itself, if attained."""
        return self.pair(direction) if self.is_attained else None

    def log_moments(self, direction: Direction, t: Array) -> Array:
        """By summation, relative error about 1e-13, rounded up; inf where P has mass that Q has not."""
        outcomes = self.pair(direction).outcomes
        if any(outcome.loss == math.inf for outcome in outcomes):
            return np.full(len(t), math.inf)
        common = [outcome for outcome in outcomes if math.isfinite(outcome.loss)]
        p, q, losses = (np.array(column) for column in zip(*map(dataclasses.astuple, common), strict=True))
        missed = math.fsum(outcome.q for outcome in outcomes if outcome.p == 0 and outcome.loss == -math.inf)
        farthest = float(np.abs(losses).max())

        def log_moment(moment: float) -> float:
            if (1 + moment) * farthest > _OVERFLOW:
                with np.errstate(divide="ignore"):
                    direct = float(special.logsumexp(np.log(p) + moment * losses))
                return direct + 1e-15 * (1 + moment * farthest)
            if farthest > _FAR:
                return math.log1p(max(math.fsum(p * np.expm1(moment * losses)), 0.0))
            # Small losses: Q e^((1 + t) L) less its first order in L, of which Q (e^L - 1), which adds up to `missed`,
            # is known, so that nothing cancels.
            second = q * (exp_remainder((1 + moment) * losses) - (1 + moment) * exp_remainder(losses))
            return math.log1p(max(moment * missed + math.fsum(second), 0.0))

        moments = np.array([log_moment(float(moment)) for moment in np.asarray(t, dtype=np.float64)])
        bounds: Array = np.maximum(moments, 0.0) * (1 + _SLACK)
        return bounds

    def power(self, count: int) -> FiniteOutcomes:
        """`count` independent outcomes seen together, told apart only by how often each occurred."""
        merged: dict[tuple[int, ...], tuple[float, float]] = {(0,) * len(self.outcomes): (1.0, 1.0)}
        for _ in range(count):
            longer: dict[tuple[int, ...], tuple[float, float]] = {}
            for counts, (p, q) in merged.items():
                for which, outcome in enumerate(self.outcomes):
                    more = (*counts[:which], counts[which] + 1, *counts[which + 1 :])
                    known = longer.get(more, (0.0, 0.0))
                    longer[more] = (known[0] + p * outcome.p, known[1] + q * outcome.q)
            merged = longer
        losses = [outcome.loss for outcome in self.outcomes]
        outcomes = tuple(
            Outcome(p, q, math.fsum(n * loss for n, loss in zip(counts, losses, strict=True) if n))
            for counts, (p, q) in merged.items()
        )
        return FiniteOutcomes(outcomes, self.is_attained)

    def sampled(self, rate: float) -> FiniteOutcomes:
        """(1 - rate) Q + rate P against Q: the unit takes part with probability `rate`, and Q is its absence."""
        mixed = (
            Outcome((1 - rate) * outcome.q + rate * outcome.p, outcome.q, _sampled_loss(rate, outcome.loss))
            for outcome in self.outcomes
        )
        return FiniteOutcomes(tuple(mixed), self.is_attained)


@dataclasses.dataclass(frozen=True)
class FinitePair(LossPair):
    """The outcomes seen in one direction."""

    outcomes: tuple[Outcome, ...]

    @property
    def support(self) -> tuple[float, float]:
        """Least and greatest finite loss."""
        losses = _atoms(self.outcomes).losses
        return float(losses[0]), float(losses[-1])

    @property
    def infinite(self) -> float:
        """P's mass that Q has not."""
        return math.fsum(outcome.p for outcome in self.outcomes if outcome.loss == math.inf)

    @property
    def has_atoms(self) -> bool:
        """All mass is in atoms, those at both ends of the support included."""
        return True

    def tails(self, mass: float) -> tuple[float, float]:
        """The support: nothing is cut."""
        return self.support

    def cells(self, levels: Array) -> tuple[Array, Array]:
        """Half-open cells [low, high), closed at the top of the support; outcomes that P never has are left out."""
        return _atoms(self.outcomes).cells(levels, most=self.support[1])


@functools.lru_cache(maxsize=64)
def _atoms(outcomes: tuple[Outcome, ...]) -> Atoms:
    finite = sorted((outcome.loss, outcome.p, outcome.q) for outcome in outcomes if math.isfinite(outcome.loss))
    assert finite, "P and Q have nothing in common"
    losses, p, q = (np.array(column) for column in zip(*finite, strict=True))
    return Atoms(losses, p, q, math.fsum(outcome.p for outcome in outcomes if outcome.loss == math.inf))


def _reversed(outcomes: tuple[Outcome, ...]) -> tuple[Outcome, ...]:
    return tuple(Outcome(outcome.q, outcome.p, -outcome.loss) for outcome in outcomes)


def _sampled_loss(rate: float, loss: float) -> float:
    """log(1 - rate + rate e^loss), rate < 1."""
    if loss > 1:
        return float(np.logaddexp(math.log1p(-rate), math.log(rate) + loss))
    return math.log1p(rate * math.expm1(loss))
