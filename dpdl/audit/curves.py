"""Trade-off curves that an audit may refute, and families of them that it reads an epsilon from.

A count of errors refutes a curve: "no mechanism that is at least this private would have let itself be told apart so
often". An epsilon at a small delta is a question about errors far rarer than any that an audit can count. What lies
between is a family of curves, one for each strength of the leak; the audit finds the strongest that it refutes, and
reports its epsilon. Two families:

    Gaussians      mu-GDP, for each mu: one Gaussian, or many steps on all of the data
    PlanCurves     the plan's own Poisson-sampled Gaussians, for each noise multiplier

That the claimed curve is refuted rests on no family: it is the claim itself. The number of epsilon does.

References:
    Dong, Roth, Su, Gaussian Differential Privacy, 2019. arXiv:1905.02383
    Nasr et al., Tight Auditing of Differentially Private Machine Learning, 2023. arXiv:2302.07956, section 4
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from scipy import special

from accountants import NeighboringRelation, PRVAccountant
from dpdl.audit.bounds import epsilon_of_mu, mu_of_rates
from dpdl.errors import ParameterError
from dpdl.plan import PrivacyPlan
from dpdl.privacy_report import rounded_up

__all__ = [
    "Curve",
    "CurveName",
    "Family",
    "GaussianCurve",
    "Gaussians",
    "Lines",
    "PlanCurves",
    "family_of",
    "relation_of",
]

CurveName = Literal["any", "gaussian"]

_EPSILONS = (0.0, 0.25, 1.0, 2.0, 4.0)  # where a plan's curve is asked for: each gives two lines below it
_STRONGEST = 32.0  # mu: no count of runs refutes more
_RANGE = 8.0  # times or parts of the plan's noise multiplier: where its family is searched
_LADDER = (4.0, 2.0, 1.5, 1.25, 1.1, 1.0, 0.9, 0.75, 0.5)  # times the plan's: where tests are compared
_RESOLUTION = 1.03  # of the noise multiplier: each bisection costs the accountant a curve


class Curve(Protocol):
    """A lower limit of a mechanism's trade-off curve, read from the side of the true positives."""

    def least_fpr(self, tpr: float) -> float:
        """The least false positive rate of any test with so many true positives, or a number below it."""


@dataclass(frozen=True)
class GaussianCurve:
    """Of mu-GDP: FPR >= Phi(Phi^-1(TPR) - mu)."""

    mu: float

    def least_fpr(self, tpr: float) -> float:
        """As in `Curve`."""
        return float(special.ndtr(special.ndtri(tpr) - self.mu))


@dataclass(frozen=True)
class Lines:
    """Of what is (epsilon, delta)-private for several pairs: TPR <= e^eps FPR + delta, and with the sides exchanged."""

    pairs: tuple[tuple[float, float], ...]

    def least_fpr(self, tpr: float) -> float:
        """As in `Curve`."""
        least = 0.0
        for epsilon, delta in self.pairs:
            least = max(least, math.exp(-epsilon) * (tpr - delta), 1 - delta - math.exp(epsilon) * (1 - tpr))
        return least


class Family(ABC):
    """Curves by strength; a larger strength leaks more."""

    assumption: str

    @abstractmethod
    def curve(self, strength: float) -> Curve:
        """The curve of this strength."""

    @abstractmethod
    def strongest(self, refuted: Callable[[Curve], bool], *, above: float) -> float:
        """The largest strength whose curve is refuted, or `above` if none above it is."""

    @abstractmethod
    def merit(self, fpr: float, fnr: float) -> float:
        """How telling such error rates are: what the test of an audit is chosen by."""

    @abstractmethod
    def epsilon(self, strength: float, *, delta: float) -> float:
        """Of the curve of this strength, rounded down; 0 at strength 0."""

    @abstractmethod
    def refutes(self, claimed_epsilon: float | None, strength: float, *, delta: float) -> bool:
        """Whether a claim's own curve is among those refuted, up to this strength, whatever the figure of epsilon."""


class Gaussians(Family):
    """mu-GDP; the strength is mu."""

    assumption = (
        "the mechanism's trade-off curve is Gaussian, as of equal noise on all of the data: else it is mu that is "
        "bounded, and epsilon at this delta may be smaller"
    )

    def curve(self, strength: float) -> Curve:
        """As in `Family`."""
        return GaussianCurve(strength)

    def strongest(self, refuted: Callable[[Curve], bool], *, above: float) -> float:
        """As in `Family`."""
        low, high = above, _STRONGEST
        if not refuted(self.curve(low + 1e-6)):
            return low
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if refuted(self.curve(middle)) else (low, middle)
        return low

    def merit(self, fpr: float, fnr: float) -> float:
        """Mu."""
        return mu_of_rates(fpr, fnr)

    def epsilon(self, strength: float, *, delta: float) -> float:
        """As in `Family`."""
        return epsilon_of_mu(strength, delta=delta)

    def refutes(self, claimed_epsilon: float | None, strength: float, *, delta: float) -> bool:
        """False: no curve is claimed but the one through (epsilon, delta), of which the figure tells."""
        return False


class PlanCurves(Family):
    """A plan's events with other noise; the strength is 1 / noise multiplier."""

    assumption = (
        "the mechanism's trade-off curve is that of the plan at some noise multiplier: else the plan may be refuted, "
        "but the figure of epsilon is not the mechanism's"
    )

    def __init__(self, plan: PrivacyPlan) -> None:
        if not plan.noise_multiplier > 0:
            raise ParameterError("The plan has no noise: there is no claim to audit.")
        self._plan = plan

    def strongest(self, refuted: Callable[[Curve], bool], *, above: float) -> float:
        """As in `Family`; rounded down by up to 3%."""
        claimed = 1 / self._plan.noise_multiplier
        low = high = max(claimed, above)
        if refuted(self.curve(low)):
            while high < claimed * _RANGE and refuted(self.curve(high := 2 * high)):
                low = high
        else:
            while not refuted(self.curve(low := low / 2)):
                high = low
                if low <= max(above, claimed / _RANGE):
                    return above
        while high / low > _RESOLUTION:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if refuted(self.curve(middle)) else (low, middle)
        return max(low, above)

    def merit(self, fpr: float, fnr: float) -> float:
        """How many rungs of a ladder of ever less noise are refuted; between rungs, the share of the next one's FPR.

        A ladder, because seen from one curve alone either all tests look equally good or all equally useless.
        """
        for rung, noise in enumerate(_LADDER):
            least = self.curve(1 / (noise * self._plan.noise_multiplier)).least_fpr(1 - fnr)
            if least <= fpr:
                return rung + least / fpr
        return len(_LADDER)

    def epsilon(self, strength: float, *, delta: float) -> float:
        """As in `Family`."""
        if strength == 0:
            return 0.0
        return _accountant(replace(self._plan, noise_multiplier=1 / strength)).interval(delta).lower

    def refutes(self, claimed_epsilon: float | None, strength: float, *, delta: float) -> bool:
        """As in `Family`: of a claim that is the plan's epsilon, be it rounded up to two decimals as reports show it.

        The strongest curve refuted is rounded down, so that its figure may be the claim's own.
        """
        if claimed_epsilon is None or strength < 1 / self._plan.noise_multiplier:
            return False
        most = _accountant(self._plan).interval(delta).upper
        return claimed_epsilon <= max(most * (1 + 1e-9), float(rounded_up(most)))

    def curve(self, strength: float) -> Lines:
        """As in `Family`."""
        return _lines(replace(self._plan, noise_multiplier=1 / strength))


def family_of(curve: PrivacyPlan | CurveName) -> Family | None:
    """The family that an audit's `curve` names; None for "any".

    Raises:
        ParameterError: it is none of these.
    """
    if isinstance(curve, PrivacyPlan):
        return PlanCurves(curve)
    if curve == "gaussian":
        return Gaussians()
    if curve == "any":
        return None
    raise ParameterError(f'curve must be "any", "gaussian" or a PrivacyPlan, got {curve!r}.')


def relation_of(curve: PrivacyPlan | CurveName) -> NeighboringRelation:
    """The neighbouring relation of a plan; else that of an example which is there or not: adding or removing one."""
    return NeighboringRelation(curve.relation) if isinstance(curve, PrivacyPlan) else NeighboringRelation.ADD_OR_REMOVE


@functools.lru_cache(maxsize=1024)  # five pairs of numbers each
def _lines(plan: PrivacyPlan) -> Lines:
    spent = _accountant(plan)
    return Lines(tuple((epsilon, spent.delta_interval(epsilon).upper) for epsilon in _EPSILONS))


@functools.lru_cache(maxsize=64)
def _accountant(plan: PrivacyPlan) -> PRVAccountant:
    accountant = PRVAccountant(relation=NeighboringRelation(plan.relation))
    accountant.compose(plan.event())
    return accountant
