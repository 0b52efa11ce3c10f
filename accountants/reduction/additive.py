"""Additive noise on Poisson samples, as neighbours see it: the components that ways of sampling are built from."""

from __future__ import annotations

import dataclasses
import math

from accountants.components.component import Component
from accountants.components.sampled_noise import SampledNoise
from accountants.components.shift_mixture import ShiftMixture
from accountants.reduction.locations import Location
from accountants.relation import NeighboringRelation


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Which data sets count as neighbours.

    Attributes:
        relation: what happens to one unit.
        group: how many units it happens to, >= 1.
    """

    relation: NeighboringRelation
    group: int = 1

    @property
    def reach(self) -> int:
        """Clip norms by which a sum over all examples moves."""
        return 2 * self.group if self.relation is NeighboringRelation.REPLACE_ONE else self.group


def additive(location: Location, rate: float, neighbours: Neighbours) -> Component | None:
    """Noise on the sum of examples drawn independently with probability `rate`; None if there is no noise.

    With A(m) the noise around m and k units changed, of which j ~ Binomial(k, rate) are drawn: sum_j A(j) against
    A(0), or against sum_j A(-j) if each unit is replaced by one that pulls the other way. `ShiftMixture` has the
    proof that these dominate.
    """
    whole = location.over(neighbours.reach)
    if whole.scale == 0:
        return None
    if rate == 1:
        return SampledNoise(whole.noise, whole.scale, 1.0)
    replaced = neighbours.relation is NeighboringRelation.REPLACE_ONE
    if neighbours.group == 1 and not replaced:
        return SampledNoise(location.noise, location.scale, rate)
    present = _drawn(neighbours.group, rate)
    absent = tuple((-shift, weight) for shift, weight in present) if replaced else ((0.0, 1.0),)
    return ShiftMixture(location.noise, location.scale, present, absent)


def _drawn(size: int, rate: float) -> tuple[tuple[float, float], ...]:
    """(j, probability) of j out of `size` being drawn, those below the smallest double left out."""

    def weight(drawn: int) -> float:
        log_rates = drawn * math.log(rate) + (size - drawn) * math.log1p(-rate)
        return math.exp(math.log(math.comb(size, drawn)) + log_rates)

    weights = [(float(drawn), weight(drawn)) for drawn in range(size + 1)]
    return tuple((drawn, share) for drawn, share in weights if share > 0)
