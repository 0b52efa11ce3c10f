"""Additive noise on Poisson samples, as neighbours see it: the components that ways of sampling are built from."""

from __future__ import annotations

import dataclasses

from accountants.components.component import Component
from accountants.components.sampled_noise import SampledNoise
from accountants.components.shift_mixture import ShiftMixture
from accountants.components.shift_mixture_law import Weighted
from accountants.reduction import ranges
from accountants.reduction.locations import Location
from accountants.relation import NeighboringRelation

_LEAST_WEIGHT = 1e-300


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
        return 2 * self.group if self.replaced else self.group

    @property
    def replaced(self) -> bool:
        """Whether a changed unit is another one in its place."""
        return self.relation is NeighboringRelation.REPLACE_ONE


def additive(location: Location, rate: float, neighbours: Neighbours) -> Component | None:
    """Noise on the sum of examples drawn independently with probability `rate`; None if there is too little noise.

    With A(m) the noise around m and k units changed, of which j ~ Binomial(k, rate) are drawn: sum_j A(j) against
    A(0), or against sum_j A(-j) if each unit is replaced by one that pulls the other way. `ShiftMixture` has the
    proof that these dominate; `ranges` says what is computed with.
    """
    reach = neighbours.reach
    whole = location.over(reach)
    if whole.scale < ranges.LEAST_SCALE:
        return None
    if rate == 1 and whole.noise == "gaussian":
        return SampledNoise(whole.noise, whole.scale, 1.0)  # of any scale: `normal_form` adds these up
    scale, within = ranges.scale_within(location.scale, reach), ranges.rate_within(rate)
    component = _within_range(Location(location.noise, scale), within, neighbours)
    return component if (scale, within) == (location.scale, rate) else ranges.unattained(component)


def _within_range(location: Location, rate: float, neighbours: Neighbours) -> Component:
    if rate == 1:
        whole = location.over(neighbours.reach)
        return SampledNoise(whole.noise, whole.scale, 1.0)
    if neighbours.group == 1 and not neighbours.replaced:
        return SampledNoise(location.noise, location.scale, rate)
    present, absent = sampled_shifts(neighbours, rate)
    return ShiftMixture(location.noise, location.scale, present, absent)


def sampled_shifts(neighbours: Neighbours, rate: float, unit: int = 1) -> tuple[Weighted, Weighted]:
    """Shifts and their probabilities with and without the changed units, each drawn with probability `rate` < 1.

    Args:
        neighbours: how many units change, and how.
        rate: in (0, 1).
        unit: by how much one unit moves the sum.

    Raises:
        UnsupportedEventError: too large a group.
    """
    ranges.refuse_large_group(neighbours.group)
    present = tuple((float(drawn * unit), weight) for drawn, weight in _drawn(neighbours.group, rate))
    absent = tuple((-shift, weight) for shift, weight in present) if neighbours.replaced else ((0.0, 1.0),)
    return present, absent


def _drawn(size: int, rate: float) -> list[tuple[int, float]]:
    """(j, probability that j of `size` are drawn); what underflows is rounded up, as moments may rest on it."""
    known = [1.0]
    for _ in range(size):
        known = [(1 - rate) * a + rate * b for a, b in zip([*known, 0.0], [0.0, *known], strict=True)]
    return [(drawn, max(weight, _LEAST_WEIGHT)) for drawn, weight in enumerate(known)]
