"""An event reduced to what its privacy depends on: a multiset of components, each one mechanism seen by neighbours.

Composition commutes and un-sampled Gaussians add (1 / sigma^2 adds up), so the normal form is sorted, merged and
small: a million training steps are one component.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from accountants import arguments
from accountants.components.component import DIRECTIONS, Component
from accountants.components.sampled_noise import SampledNoise
from accountants.errors import UnsupportedEventError
from accountants.events import Event
from accountants.reduction import ranges
from accountants.reduction.additive import Neighbours
from accountants.reduction.locations import joint_scale
from accountants.reduction.reduction import components_of
from accountants.relation import NeighboringRelation


@dataclasses.dataclass(frozen=True)
class NormalForm:
    """Components with their counts, sorted; `unbounded` if some mechanism adds no noise at all."""

    counts: tuple[tuple[Component, int], ...] = ()
    unbounded: bool = False

    @property
    def has_pairs(self) -> bool:
        """Whether every component has a dominating pair in both directions."""
        return all(component.pair(direction) is not None for component, _ in self.counts for direction in DIRECTIONS)

    @property
    def is_one_step(self) -> bool:
        """Whether this is one component, once."""
        return len(self.counts) == 1 and self.counts[0][1] == 1

    @property
    def gaussian_mu(self) -> float | None:
        """mu of the one Gaussian that this is: 0 for nothing at all, inf without noise, None if it is not Gaussian."""
        if self.unbounded:
            return math.inf
        if not self.counts:
            return 0.0
        component, count = self.counts[0]
        if len(self.counts) > 1 or not isinstance(component, SampledNoise) or not component.is_plain_gaussian:
            return None
        assert count == 1, "un-sampled Gaussians are merged"
        return 1 / component.scale


def normal_form(event: Event, relation: NeighboringRelation) -> NormalForm:
    """Reduce `event` under `relation`.

    Guarantee:
        The components' composition dominates the event's under the relation. Rounding of merged Gaussians and of
        products of rates is to the safe side.

    Raises:
        UnsupportedEventError: no bound is known here, with the reason.
    """
    counts: Counter[Component] = Counter()
    unbounded = False
    for component, count in components_of(event, Neighbours(relation)):
        if count == 0:
            continue
        if component is None:
            unbounded = True
        else:
            counts[component] += count
    if sum(counts.values()) > arguments.MOST:
        raise UnsupportedEventError("more than 10^15 mechanisms in one event. Check the counts of nested repetitions.")
    plain = [c for c in counts if isinstance(c, SampledNoise) and c.is_plain_gaussian]
    if plain:
        scale = joint_scale([(c.scale, counts.pop(c)) for c in plain])
        # Alone it has a closed form, whatever its scale; with others the engines need one that they can work with.
        within = scale if not counts else ranges.scale_within(scale, 1.0)
        if within > 0:
            joint = SampledNoise("gaussian", within, 1.0)
            counts[joint if within == scale else ranges.unattained(joint)] += 1
        else:
            unbounded = True
    return NormalForm(tuple(sorted(counts.items(), key=lambda item: (repr(item[0]), item[1]))), unbounded)
