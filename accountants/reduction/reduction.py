"""From events to components: which mechanism a neighbour sees, under which relation, and where no proof is known.

Noise whose law only moves with the data (`locations`) is kept apart from how the data were sampled until both are
known: together they give a component (`additive` for independent draws, `batches` for the rest). Discrete noise and
mechanisms known by their guarantee are in `discrete_reduction`.
"""

from __future__ import annotations

from collections.abc import Iterator

from accountants.components.selected import Selected
from accountants.errors import UnsupportedEventError
from accountants.events import (
    BallsInBins,
    Composed,
    Event,
    Gaussian,
    Group,
    Laplace,
    MatrixFactorization,
    PoissonSampled,
    RepeatAndSelect,
    Repeated,
    SampledWithoutReplacement,
    Shuffled,
    TruncatedPoissonSampled,
)
from accountants.reduction import batches
from accountants.reduction.additive import Neighbours, additive
from accountants.reduction.batches import Counted
from accountants.reduction.discrete_reduction import DiscreteEvent, component_of
from accountants.reduction.locations import Location, location_of, sampled_location, stripped


def components_of(event: Event, neighbours: Neighbours) -> Iterator[Counted]:
    """Yield every mechanism of the event, as `neighbours` see it, with its count.

    Raises:
        UnsupportedEventError: no bound is known here, with the reason.
    """
    match event:
        case Gaussian() | Laplace():
            yield additive(location_of(event), 1.0, neighbours), 1
        case Repeated(inner, times):
            yield from ((component, count * times) for component, count in components_of(inner, neighbours))
        case Composed(events):
            for member in events:
                yield from components_of(member, neighbours)
        case Group(inner, size):
            yield from components_of(inner, Neighbours(neighbours.relation, neighbours.group * size))
        case PoissonSampled():
            yield from _poisson_sampled(event, neighbours)
        case TruncatedPoissonSampled():
            yield from batches.truncated(event, neighbours)
        case SampledWithoutReplacement():
            yield from batches.without_replacement(event, neighbours)
        case Shuffled():
            yield from batches.shuffled(event, neighbours)
        case BallsInBins():
            yield from batches.allocated(event, neighbours)
        case MatrixFactorization():
            yield from _matrix(event, neighbours)
        case RepeatAndSelect(run):
            yield Selected.of(components_of(run, neighbours), event.repetitions), 1
        case _ if isinstance(event, DiscreteEvent):
            yield component_of(event, neighbours), 1
        case _:
            raise UnsupportedEventError(f"unknown event {event!r}. Compose the events of accountants.events.")


def _poisson_sampled(event: PoissonSampled, neighbours: Neighbours) -> Iterator[Counted]:
    if event.sample_rate == 1:
        yield from components_of(event.event, neighbours)
        return
    rate, sole = stripped(event)
    if isinstance(sole, DiscreteEvent):
        if rate > 0:
            yield component_of(sole, neighbours, rate), 1
        return
    rate, location = sampled_location(event)
    if rate > 0 and location is not None:
        yield additive(location, rate, neighbours), 1


def _matrix(event: MatrixFactorization, neighbours: Neighbours) -> Iterator[Counted]:
    """Rounds on disjoint rows; a group's members may be in rounds that overlap, where norms add up at most."""
    if neighbours.group > 1 and event.sample_rate < 1:
        raise UnsupportedEventError(
            f"no proof for a group of {neighbours.group} under sampled MatrixFactorization: its members may take part "
            "in overlapping rounds. Use sample_rate 1, or one band and PoissonSampled."
        )
    if event.sample_rate > 0:
        location = Location("gaussian", event.noise_multiplier)
        yield additive(location, event.sample_rate, neighbours), event.rounds
