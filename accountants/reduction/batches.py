"""Components of batches whose size is fixed or bounded, and of epochs in which each example has one batch.

The proofs are with the events: `accountants.events.sampling`, `.fixed_size`, `.allocation`.
"""

from __future__ import annotations

import math

from scipy import special

from accountants.components.allocation import Allocation
from accountants.components.component import Component
from accountants.components.labelled import Labelled
from accountants.components.sampled_noise import SampledNoise
from accountants.components.subset_sampled import SubsetSampled
from accountants.errors import UnsupportedEventError
from accountants.events import BallsInBins, SampledWithoutReplacement, Shuffled, TruncatedPoissonSampled
from accountants.reduction import ranges
from accountants.reduction.additive import Neighbours, additive
from accountants.reduction.discrete_reduction import DiscreteEvent, component_of
from accountants.reduction.locations import Location, stripped, unsampled_location
from accountants.relation import NeighboringRelation

Counted = tuple[Component | None, int]  # None: a mechanism without noise

_BINOMIAL_ROUNDING = 1e-9  # relative, and
_LEAST_PROBABILITY = 1e-300  # absolute: added to the probability that a batch overflows


def without_replacement(event: SampledWithoutReplacement, neighbours: Neighbours) -> list[Counted]:
    """Exactly batch_size of dataset_size examples."""
    if neighbours.relation is NeighboringRelation.ADD_OR_REMOVE:
        raise UnsupportedEventError(
            "SampledWithoutReplacement is not defined under add_or_remove: its batch size and data set size are "
            "public, so no example can be missing. Use relation='replace_one'."
        )
    _refuse_group(event, neighbours)
    location = unsampled_location(event.event, "SampledWithoutReplacement")
    if location is None:
        return []
    if event.batch_size == event.dataset_size:
        return [(additive(location, 1.0, neighbours), 1)]
    given = math.nextafter(event.batch_size / event.dataset_size, 1.0)
    location, rate, is_exact = _within_range(location, given, neighbours)
    # Replaced: all others pull the opposite way. Zeroed out: all others are zero.
    attained = additive(location.over(neighbours.reach), rate, _ONE)
    assert attained is None or isinstance(attained, SampledNoise)
    return [(_three_laws(location, rate, attained if is_exact else None), 1)]


def truncated(event: TruncatedPoissonSampled, neighbours: Neighbours) -> list[Counted]:
    """Poisson samples cut to max_batch_size."""
    _refuse_group(event, neighbours)
    location = unsampled_location(event.event, "TruncatedPoissonSampled")
    if location is None or event.sample_rate == 0:
        return []
    location, rate, is_exact = _within_range(location, event.sample_rate, neighbours)
    whole = additive(location, rate, neighbours)
    others, batch = event.dataset_size - 1, event.max_batch_size
    if whole is None or others < batch:
        return [(whole if is_exact or whole is None else ranges.unattained(whole), 1)]
    overflow = float(special.betainc(batch, others - batch + 1, rate))
    overflow = min(1.0, overflow * (1 + _BINOMIAL_ROUNDING) + _LEAST_PROBABILITY)
    if neighbours.relation is NeighboringRelation.ADD_OR_REMOVE:
        displaced = additive(location.over(2), rate, _ONE)
    else:
        displaced = _three_laws(location, rate, None)
    if displaced is None:
        return [(None, 1)]
    parts = ((1 - overflow, whole), (overflow, displaced))
    # Neighbours with no more examples than fit in a batch are Poisson-sampled.
    return [(Labelled(tuple(part for part in parts if part[0] > 0), attained=whole if is_exact else None), 1)]


def shuffled(event: Shuffled, neighbours: Neighbours) -> list[Counted]:
    """One epoch of a shuffled data set: one un-sampled event, of which others may hide where it was."""
    rate, sole = stripped(event.event)
    if isinstance(sole, DiscreteEvent) and rate == 1:
        _refuse_group(event, neighbours)
        one = component_of(sole, neighbours)
        return [(None if one is None else Labelled(((1.0, one),), attained=None), 1)]
    location = unsampled_location(event.event, "Shuffled")
    return [] if location is None else [(_one_batch(location, event.batches_per_epoch, neighbours), 1)]


def allocated(event: BallsInBins, neighbours: Neighbours) -> list[Counted]:
    """One epoch with each example in one of the bins."""
    location = unsampled_location(event.event, "BallsInBins")
    if location is None:
        return []
    if location.noise != "gaussian":
        raise UnsupportedEventError(
            f"no proof for BallsInBins of {event.event!r}: its noise must be Gaussian. Use Shuffled, or PoissonSampled."
        )
    if neighbours.reach > 1 or event.bins == 1:
        return [(_one_batch(location, event.bins, neighbours), 1)]
    location, _, is_exact = _within_range(location, 1.0, neighbours)
    if location.scale == 0:
        return [(None, 1)]
    allocation = Allocation(location.scale, event.bins)
    return [(allocation if is_exact else ranges.unattained(allocation), 1)]


_ONE = Neighbours(NeighboringRelation.ADD_OR_REMOVE)


def _within_range(location: Location, rate: float, neighbours: Neighbours) -> tuple[Location, float, bool]:
    """Noise and rate to compute with, at every distance up to twice the neighbours', and whether they are the given."""
    farthest = 2 * neighbours.reach
    scale = min(ranges.scale_within(location.scale, farthest), ranges.MOST_SCALE)
    within = ranges.rate_within(rate)
    return Location(location.noise, scale), within, (scale, within) == (location.scale, rate)


def _one_batch(location: Location, batches: int, neighbours: Neighbours) -> Component | None:
    """Each changed example is in one of the batches; which is revealed, and the worst is that all are in the same.

    For Gaussian noise distances in several batches add up in squares, so one batch is the worst; for other noise
    that is proved for one example only. Neighbours that differ in one example, of which one side contributes nothing
    and nor do all others, attain random allocation.
    """
    if neighbours.group > 1 and location.noise != "gaussian":
        raise UnsupportedEventError(
            f"no proof for a group of {neighbours.group} in several batches with {location.noise} noise. "
            "Use Gaussian noise, or PoissonSampled."
        )
    if batches == 1:
        return additive(location, 1.0, neighbours)
    location, _, is_exact = _within_range(location, 1.0, neighbours)
    revealed = additive(location, 1.0, neighbours)
    if revealed is None:
        return None
    attained = Allocation(location.scale, batches) if location.noise == "gaussian" and is_exact else None
    return Labelled(((1.0, revealed),), attained)


def _three_laws(location: Location, rate: float, attained: SampledNoise | None) -> Component | None:
    """The example out of the batch, in it, replaced in it: three laws pairwise within two clip norms."""
    apart = additive(location.over(2), rate, _ONE)
    if not isinstance(apart, SampledNoise) or rate == 1:
        return apart
    return SubsetSampled(apart, attained)


def _refuse_group(event: object, neighbours: Neighbours) -> None:
    if neighbours.group > 1:
        raise UnsupportedEventError(
            f"no proof for a group of {neighbours.group} under {type(event).__name__}. Use PoissonSampled, or Gaussian "
            "noise and Shuffled."
        )
