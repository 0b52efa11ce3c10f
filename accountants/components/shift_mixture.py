"""Additive noise on a sum that sampling moves by one of several shifts: mixtures of shifted laws on both sides.

    P = sum of weight * A(shift) over `present`, shifts >= 0      Q = the same over `absent`, shifts <= 0

with A(m) the noise centred at m. "remove" is (P, Q), "add" is (Q, P). Examples, with Poisson sampling at rate q:

    k examples added or removed together     P = sum_j Binomial(j; k, q) A(j),   Q = A(0)
    one example replaced                     P = (1 - q) A(0) + q A(1),          Q = (1 - q) A(0) + q A(-1)

Why the pair dominates. Fix what the other examples contribute and subtract it; the mechanism then is noise A(u) with
random true shifts u, weights as above, of norms at most those of the mixture: P' = sum w_i A(u_i) with ||u_i|| <= a_i,
Q' = sum v_j A(u'_j) with ||u'_j|| <= -b_j. For any set S of outcomes let s = A(0)(S), and let H be the half-line with
A(0)(H) = s, largest outcomes first. Each A is log-concave and symmetric (the Gaussian in several dimensions
restricts to the line between two centres), so likelihood ratios of two shifts are monotone and, by Neyman and
Pearson, A(u)(S) <= A(a)(H) if ||u|| <= a and A(u')(S) >= A(b)(H) if ||u'|| <= -b. The same H serves every shift, so

    P'(S) - e^eps Q'(S) <= P(H) - e^eps Q(H)    for every S and eps.

Where s falls inside an atom, S and H are tests with values in [0, 1]. What was fixed is a mixture over revealed
randomness, and the hockey-stick divergence is jointly convex. The same argument with all signs turned serves "add".

Shifts of both signs in one sum make the loss non-decreasing in the outcome: masses between losses are masses between
outcomes. Mirroring the outcomes turns "add" into "remove" of the mirrored mixture, so there is one direction below.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from accountants.components import shift_mixture_moments
from accountants.components.atoms import Atoms
from accountants.components.component import Array, Component, Direction, LossPair
from accountants.components.noise_laws import DISCRETE, Noise, gaussian_masses, laplace_masses
from accountants.components.shift_mixture_law import Mixture, Weighted

_NODES = 2**13  # of the table from which inversion starts
_MOST_ITERATIONS = 100  # of safeguarded Newton; halving alone closes any bracket within about 60
_PART = 2**13  # levels treated at a time, so that they stay in the processor's cache
_ROUNDING = 2.0**-50  # of a loss, relative: where inversion stops


@dataclasses.dataclass(frozen=True)
class ShiftMixture(Component):
    """Noise of one kind around several possible centres; see the module for why it dominates.

    Attributes:
        noise: the family A.
        scale: > 0; Gaussian standard deviation, Laplace b, discrete Gaussian sigma, Skellam variance. The discrete
            two are in grid units, in which shifts are whole numbers.
        present: (shift >= 0, weight > 0) with weights that sum to 1: the law P.
        absent: (shift <= 0, weight > 0) likewise: the law Q; not all shifts of both are 0.
    """

    noise: Noise
    scale: float
    present: Weighted
    absent: Weighted

    def __post_init__(self) -> None:
        assert self.scale > 0
        assert all(shift >= 0 and weight > 0 for shift, weight in self.present)
        assert all(shift <= 0 and weight > 0 for shift, weight in self.absent)
        shifts = [shift for shift, _ in self.present + self.absent]
        assert any(shifts), "P and Q are the same law"
        assert self.noise not in DISCRETE or all(float(shift).is_integer() for shift in shifts)

    def pair(self, direction: Direction) -> ShiftMixturePair:
        """The pair itself: neighbours attain it."""
        return ShiftMixturePair(self._mixture(direction))

    def log_moments(self, direction: Direction, t: Array) -> Array:
        """By quadrature or summation, relative error below 1e-10, rounded up."""
        return shift_mixture_moments.log_moments(self._mixture(direction), t)

    def _mixture(self, direction: Direction) -> Mixture:
        mixture = Mixture.of(self.noise, self.scale, self.present, self.absent)
        return mixture if direction == "remove" else mixture.mirrored()


@dataclasses.dataclass(frozen=True)
class ShiftMixturePair(LossPair):
    """A mixture to the right of 0 against a mixture to the left of it: the loss grows with the outcome."""

    mixture: Mixture

    @property
    def support(self) -> tuple[float, float]:
        """Laplace noise bounds the loss on both sides; other noise where one of the laws is not moved at all."""
        return self.mixture.support

    @property
    def has_atoms(self) -> bool:
        """Laplace noise has point masses at both ends of the support and no other; discrete noise only elsewhere."""
        return self.mixture.noise == "laplace"

    def tails(self, mass: float) -> tuple[float, float]:
        """Quantiles of the outermost shifts' noise at `mass`; the support where it is bounded."""
        mixture = self.mixture
        if mixture.noise in DISCRETE:
            return _atoms(mixture).tails(mass)
        if mixture.noise == "laplace":
            return self.support
        low, high = (float(x) for x in mixture.losses(np.array(mixture.gaussian_quantiles(mass))))
        return low, high

    def cells(self, levels: Array) -> tuple[Array, Array]:
        """Half-open cells [low, high), closed at the top of the support."""
        mixture = self.mixture
        if mixture.noise in DISCRETE:
            return _atoms(mixture).cells(levels, most=self.support[1])
        outcomes = _outcomes(mixture, levels)
        if mixture.noise == "gaussian":
            return (
                _masses(mixture.present, outcomes, gaussian_masses),
                _masses(mixture.absent, outcomes, gaussian_masses),
            )
        least, most = self.support
        left, right = mixture.hull
        at_least = (levels[:-1] <= least) & (levels[1:] > least)
        at_most = (levels[:-1] < most) & (levels[1:] >= most)

        def with_ends(law: Weighted) -> Array:
            below = 0.5 * sum(weight * math.exp(left - shift) for shift, weight in law)
            above = 0.5 * sum(weight * math.exp(shift - right) for shift, weight in law)
            masses: Array = _masses(law, outcomes, laplace_masses) + below * at_least + above * at_most
            masses[(levels[:-1] > most) | (levels[1:] < least)] = 0.0  # levels may be rounded to inside the support
            return masses

        return with_ends(mixture.present), with_ends(mixture.absent)


def _masses(law: Weighted, edges: Array, between: Callable[[Array], Array]) -> Array:
    """Mass of a mixture of continuous noise between consecutive edges."""
    masses = np.zeros(len(edges) - 1)
    for start in range(0, len(masses), _PART):
        here = edges[start : start + _PART + 1]
        for shift, weight in law:
            masses[start : start + _PART] += weight * between(here - shift)
    return masses


@functools.lru_cache(maxsize=32)
def _atoms(mixture: Mixture) -> Atoms:
    """Every outcome of discrete noise whose mass is not 0 as a double."""
    low, high = mixture.reach
    x = np.arange(low, high + 1.0)
    losses = np.maximum.accumulate(mixture.losses(x))
    return Atoms(losses, mixture.masses(mixture.present, x), mixture.masses(mixture.absent, x))


@functools.lru_cache(maxsize=32)
def _table(mixture: Mixture) -> tuple[Array, Array]:
    """Outcomes that hold all mass, and their losses; kinks of the loss are among the outcomes."""
    low, high = mixture.hull if mixture.noise == "laplace" else mixture.reach
    shifts = [shift for shift, _ in mixture.present + mixture.absent]
    x = np.unique(np.concatenate([np.linspace(low, high, _NODES), [0.0], shifts]))
    return x, np.maximum.accumulate(mixture.losses(x))


def _outcomes(mixture: Mixture, levels: Array) -> Array:
    """The outcome at which the loss reaches each level; the ends of what holds mass for levels beyond them.

    Rounding: the loss at the result differs from the level by a few roundings of the loss, so an outcome can only be
    counted to a neighbouring cell whose losses equal its own to that accuracy.
    """
    x, losses = _table(mixture)
    outcomes = np.where(levels <= losses[0], x[0], x[-1])
    if mixture.noise == "gaussian":
        outcomes = np.where(levels <= losses[0], -np.inf, np.inf)
    inside = (levels > losses[0]) & (levels < losses[-1])
    for part in np.array_split(np.flatnonzero(inside), max(1, len(levels) // _PART)):
        if len(part):
            outcomes[part] = _inverted(mixture, levels[part])
    ordered: Array = np.maximum.accumulate(outcomes)
    return ordered


def _inverted(mixture: Mixture, levels: Array) -> Array:
    """Newton's method within brackets from the table; a step out of its bracket halves it instead."""
    x, losses = _table(mixture)
    right = np.clip(np.searchsorted(losses, levels), 1, len(x) - 1)
    low, high = x[right - 1], x[right]
    rise = losses[right] - losses[right - 1]
    part = (levels - losses[right - 1]) / np.where(rise > 0, rise, 1.0)
    guess = low + np.clip(part, 0.0, 1.0) * (high - low)
    result = guess.copy()
    unit = min(1.0, float(losses[-1] - losses[0]))
    active = np.arange(len(levels))
    for _ in range(_MOST_ITERATIONS):
        value, slope = mixture.losses_and_slopes(guess)
        residual = value - levels[active]
        above = residual > 0
        high, low = np.where(above, guess, high), np.where(above, low, guess)
        middle = low + (high - low) / 2
        newton = guess - residual / np.maximum(slope, 1e-300)
        better = np.where((newton >= low) & (newton <= high), newton, middle)
        result[active] = better
        open_still = (np.abs(residual) > _ROUNDING * (unit + np.abs(value))) & (middle > low) & (middle < high)
        if not open_still.any():
            break
        active, guess = active[open_still], better[open_still]
        low, high = low[open_still], high[open_still]
    return result
