"""From events to components: which mechanism a neighbour sees, under which relation, and where no proof is known.

Noise whose law only moves with the data (`Location`) is kept apart from how the data were sampled until both are
known: together they give a mixture of shifted laws, which is a component.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from accountants.components.component import Component
from accountants.components.sampled_noise import Noise, SampledNoise
from accountants.errors import UnsupportedEventError
from accountants.events import Composed, Event, Gaussian, Laplace, PoissonSampled, Repeated
from accountants.relation import NeighboringRelation

Counted = tuple[Component | None, int]  # None: a mechanism without noise


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Which data sets count as neighbours.

    Attributes:
        relation: what happens to one unit.
        group: how many units it happens to, >= 1.
    """

    relation: NeighboringRelation
    group: int = 1


@dataclasses.dataclass(frozen=True)
class Location:
    """Noise added to a sum that one unit moves by at most 1.

    Attributes:
        noise: the family.
        scale: standard deviation (Gaussian) or scale b (Laplace), >= 0.
    """

    noise: Noise
    scale: float


def components_of(event: Event, neighbours: Neighbours) -> Iterator[Counted]:
    """Yield every mechanism of the event, as `neighbours` see it, with its count.

    Raises:
        UnsupportedEventError: no bound is known here, with the reason.
    """
    match event:
        case Gaussian() | Laplace():
            yield _sampled(_location(event), 1.0, neighbours), 1
        case Repeated(inner, times):
            yield from ((component, count * times) for component, count in components_of(inner, neighbours))
        case Composed(events):
            for member in events:
                yield from components_of(member, neighbours)
        case PoissonSampled(rate, inner):
            yield from _poisson_sampled(rate, inner, neighbours)
        case _:
            raise UnsupportedEventError(f"unknown event {event!r}. Compose the events of accountants.events.")


def _poisson_sampled(rate: float, inner: Event, neighbours: Neighbours) -> Iterator[Counted]:
    if rate == 1:
        yield from components_of(inner, neighbours)
        return
    own_rate, location = sampled_location(inner)
    if rate > 0 and own_rate > 0 and location is not None:
        # A product of two rates may have been rounded down.
        product = rate if own_rate == 1 else min(1.0, rate * own_rate * (1 + 2**-52))
        yield _sampled(location, product, neighbours), 1


def sampled_location(event: Event) -> tuple[float, Location | None]:
    """The sampling rate and the noise that `event` is on one subset; None if it releases nothing.

    Raises:
        UnsupportedEventError: it is not one sampled mechanism.
    """
    match event:
        case PoissonSampled(rate, inner):
            own, location = sampled_location(inner)
            return rate * own * (1 + 2**-52 if 0 < rate < 1 and own < 1 else 1), location
        case Repeated(inner, 1):
            return sampled_location(inner)
        case Composed(events) if len(events) == 1:
            return sampled_location(events[0])
        case _:
            locations = list(_locations(event))
    if len(locations) == 1 and locations[0][1] == 1:
        return 1.0, locations[0][0]
    if all(location.noise == "gaussian" for location, _ in locations):
        return 1.0, Location("gaussian", joint_scale([(x.scale, n) for x, n in locations])) if locations else None
    raise UnsupportedEventError(
        f"no proof for sampling of {event!r}: several mechanisms on one subset have no one-dimensional "
        "dominating pair unless all are un-sampled Gaussians. Sample each release separately, or use rate 1."
    )


def _locations(event: Event) -> Iterator[tuple[Location, int]]:
    """The un-sampled noises that an event consists of."""
    match event:
        case Gaussian() | Laplace():
            yield _location(event), 1
        case Repeated(inner, times):
            if times:
                yield from ((location, count * times) for location, count in _locations(inner))
        case Composed(events):
            for member in events:
                yield from _locations(member)
        case _:
            raise UnsupportedEventError(
                f"no proof for sampling of {event!r} within a composition. Sample each release separately."
            )


def _location(event: Gaussian | Laplace) -> Location:
    if isinstance(event, Gaussian):
        return Location("gaussian", event.noise_multiplier)
    return Location("laplace", event.scale)


def _sampled(location: Location, rate: float, neighbours: Neighbours) -> Component | None:
    if location.scale == 0:
        return None
    scale = location.scale
    if neighbours.relation is NeighboringRelation.REPLACE_ONE:
        if rate < 1:
            raise UnsupportedEventError(
                f"no proof for PoissonSampled at sample_rate {rate!r} under replace_one. Use relation='add_or_remove'."
            )
        scale = scale / 2  # the sum moves by two clip norms; exact in binary
    return SampledNoise(location.noise, scale, rate)


def joint_scale(gaussians: Sequence[tuple[float, int]]) -> float:
    """Scale of the one Gaussian that these (scale, count) are together, rounded down; 0 if one has no noise."""
    if any(scale == 0 for scale, _ in gaussians):
        return 0.0
    # In units of the least scale, so that neither 1e-200 nor 1e200 leaves the range of a double.
    least = min(scale for scale, _ in gaussians)
    total = math.fsum(count * (least / scale) ** 2 for scale, count in gaussians)
    return least / math.sqrt(total) * (1 - 2**-50 if total != 1 else 1)
