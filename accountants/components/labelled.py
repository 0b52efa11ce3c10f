"""A mechanism that first says which of several it is: a public label, independent of the data, picks one.

Given the label, neighbours are a pair of the mechanism it names, so hockey-stick divergences, masses between losses
and moments are all averages over the labels. A mechanism that keeps its label to itself is at most as revealing, so
what neighbours are known to attain is stated apart; with a single label, that is all this component adds.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import special

from accountants.components.component import Array, Component, Direction, LossPair

_ROUNDING = 1e-12  # relative, of the average of moments
_EXPONENT = 600.0  # e to this power is a double


@dataclasses.dataclass(frozen=True)
class Labelled(Component):
    """Components under public labels, with the labels' probabilities.

    Attributes:
        parts: (probability > 0, component), probabilities adding up to 1.
        attained: a component of neighbours whose label tells nothing; None if no such are known.
    """

    parts: tuple[tuple[float, Component], ...]
    attained: Component | None

    def pair(self, direction: Direction) -> LossPair | None:
        """The average of the parts' pairs; None if one has none."""
        pairs = [(weight, component.pair(direction)) for weight, component in self.parts]
        known = tuple((weight, pair) for weight, pair in pairs if pair is not None)
        return LabelledPair(known) if len(known) == len(pairs) else None

    def witness(self, direction: Direction) -> LossPair | None:
        """That of `attained`."""
        return None if self.attained is None else self.attained.witness(direction)

    def log_moments(self, direction: Direction, t: Array) -> Array:
        """log of the average of e^moment; as log1p of the average of e^moment - 1 where that does not overflow."""
        moments = np.stack([component.log_moments(direction, t) for _, component in self.parts])
        weights = np.array([[weight] for weight, _ in self.parts])
        small = np.log1p((weights * np.expm1(np.minimum(moments, _EXPONENT))).sum(axis=0))
        large = special.logsumexp(moments, b=weights, axis=0)
        average: Array = np.where(moments.max(axis=0) < _EXPONENT, small, large)
        return average * (1 + _ROUNDING)


@dataclasses.dataclass(frozen=True)
class LabelledPair(LossPair):
    """Pairs under public labels: masses between losses add up."""

    parts: tuple[tuple[float, LossPair], ...]

    @property
    def support(self) -> tuple[float, float]:
        """The hull."""
        ends = [pair.support for _, pair in self.parts]
        return min(low for low, _ in ends), max(high for _, high in ends)

    @property
    def has_atoms(self) -> bool:
        """Whether both ends of the hull are atoms of some part."""
        low, high = self.support
        atomic = [pair.support for _, pair in self.parts if pair.has_atoms]
        return any(end[0] == low for end in atomic) and any(end[1] == high for end in atomic)

    @property
    def infinite(self) -> float:
        """Weighted sum."""
        return math.fsum(weight * pair.infinite for weight, pair in self.parts)

    def tails(self, mass: float) -> tuple[float, float]:
        """The widest of the parts' tails, each at its share of `mass`."""
        ends = [pair.tails(min(mass / weight, 0.25)) for weight, pair in self.parts]
        return min(low for low, _ in ends), max(high for _, high in ends)

    def cells(self, levels: Array) -> tuple[Array, Array]:
        """Weighted sums."""
        p, q = np.zeros(len(levels) - 1), np.zeros(len(levels) - 1)
        for weight, pair in self.parts:
            p_part, q_part = pair.cells(levels)
            p += weight * p_part
            q += weight * q_part
        return p, q
