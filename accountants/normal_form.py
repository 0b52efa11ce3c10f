"""An event reduced to what its privacy depends on: a multiset of sampled noise mechanisms.

Composition commutes and un-sampled Gaussians add (1 / sigma^2 adds up), so the normal form is sorted, merged and
small: a million training steps are one component.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from accountants.errors import UnsupportedEventError
from accountants.events import Composed, Event, Gaussian, Laplace, PoissonSampled, Repeated
from accountants.relation import NeighboringRelation

Noise = Literal["gaussian", "laplace"]


@dataclasses.dataclass(frozen=True, order=True)
class Component:
    """Noise of one kind, seen through Poisson sampling: the pair (1 - q) A(0) + q A(1) against A(0).

    Attributes:
        noise: the family A; A(m) is centred at m.
        scale: standard deviation (Gaussian) or scale b (Laplace) over the sensitivity, > 0.
        rate: q in (0, 1].
    """

    noise: Noise
    scale: float
    rate: float


@dataclasses.dataclass(frozen=True)
class NormalForm:
    """Components with their counts, sorted; `unbounded` if some mechanism adds no noise at all."""

    counts: tuple[tuple[Component, int], ...] = ()
    unbounded: bool = False

    @property
    def gaussian_mu(self) -> float | None:
        """mu of the one Gaussian that this is: 0 for nothing at all, inf without noise, None if it is not Gaussian."""
        if self.unbounded:
            return math.inf
        if not self.counts:
            return 0.0
        component, count = self.counts[0]
        if len(self.counts) > 1 or component.noise != "gaussian" or component.rate < 1:
            return None
        assert count == 1, "un-sampled Gaussians are merged"
        return 1 / component.scale


def normal_form(event: Event, relation: NeighboringRelation) -> NormalForm:
    """Reduce `event` under `relation`.

    Guarantee:
        The components' composition dominates the event's under the relation (they are equal but for rounding of
        the merged Gaussian, which is to the safe side).

    Raises:
        UnsupportedEventError: no dominating pair is known here, with the reason.
    """
    counts: Counter[Component] = Counter()
    for noise, scale, rate, count in _mechanisms(event, 1):
        if count == 0 or rate == 0:
            continue
        if relation is NeighboringRelation.REPLACE_ONE:
            if rate < 1:
                raise UnsupportedEventError(
                    f"no proof for PoissonSampled at sample_rate {rate!r} under replace_one: the sampled mixtures "
                    "have no one-dimensional dominating pair here. Use relation='add_or_remove' or 'zero_out'; by "
                    "group privacy, replacing is one removal and one addition."
                )
            scale = scale / 2  # the sum moves by two clip norms; exact in binary
        counts[Component(noise, scale, rate)] += count
    unbounded = any(component.scale == 0 for component in counts)
    plain = [c for c in counts if c.noise == "gaussian" and c.rate == 1]
    if plain and not unbounded:
        # In units of the least scale, so that neither 1e-200 nor 1e200 leaves the range of a double.
        least = min(c.scale for c in plain)
        total = math.fsum(counts.pop(c) * (least / c.scale) ** 2 for c in plain)
        merged = least / math.sqrt(total)
        if total != 1:
            merged *= 1 - 2**-50  # a little less noise than the exact sum: rounding to the safe side
        counts[Component("gaussian", merged, 1.0)] += 1
    return NormalForm(tuple(sorted(counts.items())), unbounded)


def _mechanisms(event: Event, count: int) -> Iterator[tuple[Noise, float, float, int]]:
    """Yield (noise, scale, rate, count) for every mechanism in the event."""
    match event:
        case Gaussian(noise_multiplier):
            yield "gaussian", noise_multiplier, 1.0, count
        case Laplace(scale):
            yield "laplace", scale, 1.0, count
        case Repeated(inner, times):
            yield from _mechanisms(inner, count * times)
        case Composed(events):
            for member in events:
                yield from _mechanisms(member, count)
        case PoissonSampled(rate, inner):
            yield from _sampled(rate, inner, count)
        case _:
            raise UnsupportedEventError(f"unknown event {event!r}. Compose the events of accountants.events.")


def _sampled(rate: float, inner: Event, count: int) -> Iterator[tuple[Noise, float, float, int]]:
    """Sampling of one mechanism; of several un-sampled Gaussians on the same subset, which are one Gaussian."""
    mechanisms = [m for m in _mechanisms(inner, 1) if m[3] and m[2]]
    if rate == 1 or not mechanisms:
        yield from ((noise, scale, own_rate, own * count) for noise, scale, own_rate, own in mechanisms)
    elif len(mechanisms) == 1 and mechanisms[0][3] == 1:
        noise, scale, own_rate, _ = mechanisms[0]
        yield noise, scale, min(1.0, rate * own_rate * (1 + 2**-52 if own_rate < 1 else 1)), count
    elif all(noise == "gaussian" and own_rate == 1 for noise, _, own_rate, _ in mechanisms):
        joint = normal_form(inner, NeighboringRelation.ADD_OR_REMOVE)
        yield "gaussian", 0.0 if joint.unbounded else joint.counts[0][0].scale, rate, count
    else:
        raise UnsupportedEventError(
            f"no proof for PoissonSampled of {inner!r}: several mechanisms on one subset have no one-dimensional "
            "dominating pair unless all are un-sampled Gaussians. Sample each release separately, or use rate 1."
        )
