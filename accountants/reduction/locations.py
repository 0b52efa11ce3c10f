"""Noise whose law only moves with the data, found inside events: what a way of sampling is put together with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from accountants.components.sampled_noise import Noise
from accountants.errors import UnsupportedEventError
from accountants.events import Composed, Event, Gaussian, Laplace, PoissonSampled, Repeated


@dataclasses.dataclass(frozen=True)
class Location:
    """Noise added to a sum that one unit moves by at most 1.

    Attributes:
        noise: the family.
        scale: standard deviation (Gaussian) or scale b (Laplace), >= 0.
    """

    noise: Noise
    scale: float

    def over(self, shift: int) -> Location:
        """The same noise in units of a sum that moves by `shift`, rounded down."""
        scale = self.scale / shift
        exact = shift & (shift - 1) == 0  # powers of two
        return Location(self.noise, scale if exact else math.nextafter(scale, 0.0))


def location_of(event: Gaussian | Laplace) -> Location:
    """The noise that an un-sampled event is."""
    if isinstance(event, Gaussian):
        return Location("gaussian", event.noise_multiplier)
    return Location("laplace", event.scale)


def stripped(event: Event) -> tuple[float, Event]:
    """The Poisson rate at which `event` runs, and what runs there: nested sampling and wrappers of one taken off."""
    match event:
        case PoissonSampled(rate, inner):
            own, sole = stripped(inner)
            return product_of_rates(rate, own), sole
        case Repeated(inner, 1):
            return stripped(inner)
        case Composed(events) if len(events) == 1:
            return stripped(events[0])
        case _:
            return 1.0, event


def sampled_location(event: Event) -> tuple[float, Location | None]:
    """The sampling rate and the noise that `event` is on one subset; None if it releases nothing.

    Raises:
        UnsupportedEventError: it is not one sampled mechanism.
    """
    rate, sole = stripped(event)
    locations = list(_locations(sole))
    if len(locations) == 1 and locations[0][1] == 1:
        return rate, locations[0][0]
    if all(location.noise == "gaussian" for location, _ in locations):
        joint = joint_scale([(location.scale, count) for location, count in locations]) if locations else None
        return rate, None if joint is None else Location("gaussian", joint)
    raise UnsupportedEventError(
        f"no proof for sampling of {event!r}: several mechanisms on one subset have no one-dimensional "
        "dominating pair unless all are un-sampled Gaussians. Sample each release separately, or use rate 1."
    )


def unsampled_location(event: Event, owner: str) -> Location | None:
    """The noise that `event` is on one batch, which must not be sampled again; None if it releases nothing.

    Raises:
        UnsupportedEventError: it is not, in the name of the event `owner` that draws the batch.
    """
    rate, location = sampled_location(event)
    if rate != 1:
        raise UnsupportedEventError(
            f"no proof for {owner} of {event!r}: a batch drawn from a batch. Put un-sampled noise inside {owner}."
        )
    return location


def product_of_rates(a: float, b: float) -> float:
    """a * b, rounded up where it is rounded at all."""
    if a in (0, 1) or b in (0, 1):
        return a * b
    return min(1.0, a * b * (1 + 2**-52))


def joint_scale(gaussians: Sequence[tuple[float, int]]) -> float:
    """Scale of the one Gaussian that these (scale, count) are together, rounded down; 0 if one has no noise."""
    if any(scale == 0 for scale, _ in gaussians):
        return 0.0
    # In units of the least scale, so that neither 1e-200 nor 1e200 leaves the range of a double.
    least = min(scale for scale, _ in gaussians)
    total = math.fsum(count * (least / scale) ** 2 for scale, count in gaussians)
    return least / math.sqrt(total) * (1 - 2**-50 if total != 1 else 1)


def _locations(event: Event) -> Iterator[tuple[Location, int]]:
    """The un-sampled noises that an event consists of."""
    match event:
        case Gaussian() | Laplace():
            yield location_of(event), 1
        case Repeated(inner, times):
            if times:
                yield from ((location, count * times) for location, count in _locations(inner))
        case Composed(events):
            for member in events:
                yield from _locations(member)
        case _:
            raise UnsupportedEventError(
                f"no proof for {event!r} within an event that samples or batches. Sample each release separately, and "
                "put Group outermost."
            )
