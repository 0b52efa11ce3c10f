"""From discrete and black-box events to components, under each relation, group size and Poisson rate."""

from __future__ import annotations

import math

from scipy import special

from accountants.components.component import Component
from accountants.components.finite import FiniteOutcomes, Outcome
from accountants.components.moments_only import Concentrated, SkellamVectorNoise
from accountants.components.noise_laws import Noise
from accountants.components.shift_mixture import ShiftMixture
from accountants.errors import UnsupportedEventError
from accountants.events.black_box import ZCDP, EpsilonDelta
from accountants.events.event import Event
from accountants.events.noise import DiscreteGaussian, RandomizedResponse, Skellam, SkellamVector
from accountants.reduction.additive import Neighbours
from accountants.relation import NeighboringRelation

DiscreteEvent = DiscreteGaussian | Skellam | SkellamVector | RandomizedResponse | EpsilonDelta | ZCDP

_NOTHING = FiniteOutcomes((Outcome(1.0, 1.0, 0.0),))
_LEAST_PROBABILITY = 1e-290  # of a random answer; below, the answer counts as the truth
_ROUNDING = 1 + 2**-50  # on computed parameters of guarantees


def component_of(event: DiscreteEvent, neighbours: Neighbours, rate: float = 1.0) -> Component | None:
    """The mechanism as neighbours see it; None if it reveals its data.

    Args:
        event: what ran.
        neighbours: relation and group size.
        rate: Poisson rate in (0, 1] of the subset that it ran on.

    Raises:
        UnsupportedEventError: no bound is known here, with the reason.
    """
    match event:
        case DiscreteGaussian() | Skellam():
            return _shifted(event, neighbours, rate)
        case RandomizedResponse():
            return _randomized_response(event, neighbours, rate)
        case EpsilonDelta():
            return _epsilon_delta(event, neighbours, rate)
        case SkellamVector():
            _refuse_sampling(event, rate, "its Renyi curve alone does not say what sampling does")
            if event.variance == 0:
                return None
            moved = neighbours.reach
            return SkellamVectorNoise(event.variance, moved * event.l1_sensitivity, moved * event.l2_sensitivity)
        case ZCDP():
            _refuse_sampling(event, rate, "a concentrated guarantee alone does not say what sampling does")
            return _zcdp(event, neighbours.group)


def location_of(event: DiscreteGaussian | Skellam) -> tuple[Noise, float, int]:
    """(noise, scale as in `ShiftMixture`, shift in grid units by which one unit moves the answer)."""
    if isinstance(event, DiscreteGaussian):
        return "discrete_gaussian", event.noise_multiplier * event.sensitivity, event.sensitivity
    return "skellam", event.variance, event.sensitivity


def _shifted(event: DiscreteGaussian | Skellam, neighbours: Neighbours, rate: float) -> Component | None:
    noise, scale, unit = location_of(event)
    if scale == 0:
        return None
    if rate == 1:
        return ShiftMixture(noise, scale, ((float(neighbours.reach * unit), 1.0),), ((0.0, 1.0),))
    present = tuple((float(drawn * unit), weight) for drawn, weight in _drawn(neighbours.group, rate))
    replaced = neighbours.relation is NeighboringRelation.REPLACE_ONE
    absent = tuple((-shift, weight) for shift, weight in present) if replaced else ((0.0, 1.0),)
    return ShiftMixture(noise, scale, present, absent)


def _drawn(size: int, rate: float) -> list[tuple[int, float]]:
    """(j, probability that j of `size` are drawn), those below the smallest double left out."""
    known = [1.0]
    for _ in range(size):
        known = [(1 - rate) * a + rate * b for a, b in zip([*known, 0.0], [0.0, *known], strict=True)]
    return [(drawn, weight) for drawn, weight in enumerate(known) if weight > 0]


def _randomized_response(event: RandomizedResponse, neighbours: Neighbours, rate: float) -> Component | None:
    k, truthful, uniform = event.k, rate * (1 - event.p), 1 - rate + rate * event.p
    if truthful == 0:
        return _NOTHING
    if uniform < _LEAST_PROBABILITY:
        return None
    other = uniform / k
    if neighbours.relation is NeighboringRelation.REPLACE_ONE:
        loss = math.log1p(truthful / other)
        one = [Outcome(truthful + other, other, loss), Outcome(other, truthful + other, -loss)]
        if k > 2:
            one.append(Outcome((k - 2) * other, (k - 2) * other, 0.0))
    else:
        less = math.log1p(-truthful) if truthful < 0.5 else math.log(uniform)
        one = [
            Outcome(truthful + other, 1 / k, math.log1p((k - 1) * truthful)),
            Outcome((k - 1) * other, (k - 1) / k, less),
        ]
    # Members of a group answer independently of each other.
    return FiniteOutcomes(tuple(one)).power(neighbours.group)


def _epsilon_delta(event: EpsilonDelta, neighbours: Neighbours, rate: float) -> Component | None:
    size = neighbours.group
    if rate < 1 and (size > 1 or neighbours.relation is not NeighboringRelation.ADD_OR_REMOVE):
        raise UnsupportedEventError(
            f"no proof for Poisson sampling of {event!r} under {neighbours.relation.value} in groups of {size}: a "
            "sample without the unit is covered by the guarantee only for adding or removing one. Use "
            "relation='add_or_remove', or account un-sampled."
        )
    epsilon, delta = event.epsilon, event.delta
    if size > 1:
        epsilon, delta = _of_group(epsilon, delta, size)
    if epsilon == 0 and delta == 0:
        return _NOTHING
    if delta >= 1 and rate == 1:
        return None
    worst = _worst(epsilon, min(delta, 1.0), is_attained=size == 1)
    return worst if rate == 1 else worst.sampled(rate)


def _of_group(epsilon: float, delta: float, size: int) -> tuple[float, float]:
    """size * epsilon, and delta times the sum of e^(i epsilon) over i < size; rounded up."""
    if delta > 0:
        largest = math.log(delta) + (size - 1) * epsilon
        relative = math.fsum(math.exp(-i * epsilon) for i in range(size))
        delta = math.exp(min(largest, 0.0)) * relative * _ROUNDING
    return size * epsilon * _ROUNDING, delta


def _worst(epsilon: float, delta: float, *, is_attained: bool) -> FiniteOutcomes:
    """The pair that dominates all (epsilon, delta)-private ones: told with probability delta, else e^epsilon apart."""
    likely = (1 - delta) * float(special.expit(epsilon))
    unlikely = (1 - delta) * float(special.expit(-epsilon))
    common = (Outcome(likely, unlikely, epsilon), Outcome(unlikely, likely, -epsilon)) if delta < 1 else ()
    told = (Outcome(delta, 0.0, math.inf), Outcome(0.0, delta, -math.inf)) if delta > 0 else ()
    return FiniteOutcomes(common + told, is_attained)


def _zcdp(event: ZCDP, size: int) -> Component:
    if event.rho == event.xi == 0:
        return _NOTHING
    if size > 1 and event.xi > 0:
        raise UnsupportedEventError(
            f"no proof for groups of {size} of {event!r}: only guarantees with xi = 0 scale. Account one unit, or "
            "restate the guarantee for groups and compose that."
        )
    return Concentrated(event.rho * size * size * (_ROUNDING if size > 1 else 1), event.xi)


def _refuse_sampling(event: Event, rate: float, reason: str) -> None:
    if rate < 1:
        raise UnsupportedEventError(
            f"no proof for Poisson sampling of {event!r}: {reason}. Account it un-sampled, which covers any subset."
        )
