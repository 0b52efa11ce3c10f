"""From discrete and black-box events to components, under each relation, group size and Poisson rate."""

from __future__ import annotations

import dataclasses
import math

from scipy import special

from accountants.components import noise_laws
from accountants.components.component import Component
from accountants.components.finite import FiniteOutcomes, Outcome
from accountants.components.moments_only import Concentrated, SkellamVectorNoise
from accountants.components.noise_laws import Noise
from accountants.components.shift_mixture import ShiftMixture
from accountants.errors import UnsupportedEventError
from accountants.events.black_box import ZCDP, EpsilonDelta
from accountants.events.event import Event
from accountants.events.noise import DiscreteGaussian, RandomizedResponse, Skellam, SkellamVector
from accountants.reduction import ranges
from accountants.reduction.additive import Neighbours, sampled_shifts
from accountants.relation import NeighboringRelation

DiscreteEvent = DiscreteGaussian | Skellam | SkellamVector | RandomizedResponse | EpsilonDelta | ZCDP

_NOTHING = FiniteOutcomes((Outcome(1.0, 1.0, 0.0),))
_LEAST_PROBABILITY = 1e-290  # of a random answer; below, the answer counts as the truth
_MOST_OUTCOMES = {"discrete_gaussian": 2**20, "skellam": 2**17}  # of discrete noise, listed one by one
_MOST_WORK = 2**26  # outcomes times unit steps
_FARTHEST = 30  # standard deviations of discrete Gaussians between neighbours, whose common mass is then e^-450
_MOST_ANSWERS = 2**11  # of a group, told apart by how many of its members gave which
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
            moved = neighbours.reach
            return _skellam_curve(event.variance, moved * event.l1_sensitivity, moved * event.l2_sensitivity)
        case ZCDP():
            _refuse_sampling(event, rate, "a concentrated guarantee alone does not say what sampling does")
            return _zcdp(event, neighbours.group)


def location_of(event: DiscreteGaussian | Skellam) -> tuple[Noise, float, int]:
    """(noise, scale as in `ShiftMixture`, shift in grid units by which one unit moves the answer)."""
    if isinstance(event, DiscreteGaussian):
        return "discrete_gaussian", event.noise_multiplier * event.sensitivity, event.sensitivity
    return "skellam", event.variance, event.sensitivity


def _shifted(event: DiscreteGaussian | Skellam, neighbours: Neighbours, rate: float) -> Component | None:
    """The exact pair where its outcomes can be listed; else, un-sampled, the curve that the noise's vectors have."""
    noise, scale, unit = location_of(event)
    distance = neighbours.reach * unit
    spread = scale if noise == "discrete_gaussian" else math.sqrt(scale)
    if spread < ranges.LEAST_SCALE * distance:
        return None
    outcomes = 2 * (noise_laws.GAUSSIAN_REACH * spread + distance)
    # A Skellam ratio over a distance is a sum over its unit steps, at every outcome.
    work = outcomes * (distance if noise == "skellam" else 1)
    is_long = outcomes > _MOST_OUTCOMES[noise] or work > _MOST_WORK
    if is_long:
        reason = f"its outcomes, about {outcomes:.2g}, or their ratios over {distance} grid units are too many to list"
        _refuse_sampling(event, rate, reason)
    if is_long or (rate == 1 and _are_disjoint(event, distance)):
        if isinstance(event, DiscreteGaussian):
            share = neighbours.reach / ranges.scale_within(event.noise_multiplier, neighbours.reach)
            return Concentrated(share * share / 2 * _ROUNDING, 0.0)
        return _skellam_curve(event.variance, float(distance), float(distance))
    if rate == 1:
        return ShiftMixture(noise, scale, ((float(distance), 1.0),), ((0.0, 1.0),))
    within = ranges.rate_within(rate)
    component = ShiftMixture(noise, scale, *sampled_shifts(neighbours, within, unit))
    return component if within == rate else ranges.unattained(component)


def _are_disjoint(event: DiscreteGaussian | Skellam, distance: int) -> bool:
    """Whether laws that far apart may have no outcome in common whose mass is a double."""
    if isinstance(event, DiscreteGaussian):
        return distance > _FARTHEST * event.noise_multiplier * event.sensitivity
    return distance >= noise_laws.skellam_reach(event.variance)


def _skellam_curve(variance: float, l1: float, l2: float) -> Component | None:
    spread = math.sqrt(variance)
    if not spread >= ranges.LEAST_SCALE * l2 or math.isinf(l1):
        return None
    # More variance than counts: as if less were added.
    within = min(spread, ranges.MOST_SCALE * l2)
    return SkellamVectorNoise(variance if within == spread else within * within, l1, l2)


def _randomized_response(event: RandomizedResponse, neighbours: Neighbours, rate: float) -> Component | None:
    if event.p == 1:
        return _NOTHING
    truthful, uniform = rate * (1 - event.p), 1 - rate + rate * event.p
    is_exact = truthful >= ranges.LEAST_RATE
    if not is_exact:
        truthful, uniform = ranges.LEAST_RATE, 1 - ranges.LEAST_RATE
    if uniform < _LEAST_PROBABILITY:
        return None
    one = FiniteOutcomes(_answers(event.k, truthful, uniform, neighbours), is_exact)
    # Members of a group answer independently of each other.
    size, kinds = neighbours.group, len(one.outcomes)
    if size <= ranges.MOST_PARTS and math.comb(size + kinds - 1, kinds - 1) <= _MOST_ANSWERS:
        return one.power(size)
    return _pure(size * max(abs(outcome.loss) for outcome in one.outcomes) * _ROUNDING, is_attained=False)


def _answers(k: int, truthful: float, uniform: float, neighbours: Neighbours) -> tuple[Outcome, ...]:
    """What one unit's answer tells: the true category with probability `truthful`, else a uniform one."""
    other = uniform / k
    if neighbours.replaced:
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
    return tuple(one)


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
    if epsilon > ranges.MOST_EPSILON or (delta >= 1 and rate == 1):
        return None
    within, told = _least_within(epsilon), max(min(delta, 1.0), _LEAST_PROBABILITY if delta > 0 else 0.0)
    worst = _worst(within, told, is_attained=size == 1 and (within, told) == (epsilon, delta))
    if rate == 1:
        return worst
    sampled = worst.sampled(ranges.rate_within(rate))
    return sampled if rate >= ranges.LEAST_RATE else dataclasses.replace(sampled, is_attained=False)


def _pure(epsilon: float, *, is_attained: bool) -> Component | None:
    """Any mechanism of largest loss epsilon > 0."""
    within = _least_within(epsilon)
    return None if epsilon > ranges.MOST_EPSILON else _worst(within, 0.0, is_attained=is_attained)


def _least_within(epsilon: float) -> float:
    return max(epsilon, ranges.LEAST_EPSILON) if epsilon > 0 else 0.0


def _of_group(epsilon: float, delta: float, size: int) -> tuple[float, float]:
    """size * epsilon, and delta times the sum of e^(i epsilon) over i < size; rounded up."""
    if delta > 0:
        largest = math.log(delta) + (size - 1) * epsilon
        relative = math.expm1(-size * epsilon) / math.expm1(-epsilon) if epsilon > 0 else float(size)
        delta = math.exp(min(largest, 0.0)) * relative * _ROUNDING
    return size * epsilon * _ROUNDING, delta


def _worst(epsilon: float, delta: float, *, is_attained: bool) -> FiniteOutcomes:
    """The pair that dominates all (epsilon, delta)-private ones: told with probability delta, else e^epsilon apart."""
    likely = (1 - delta) * float(special.expit(epsilon))
    unlikely = (1 - delta) * float(special.expit(-epsilon))
    common = (Outcome(likely, unlikely, epsilon), Outcome(unlikely, likely, -epsilon)) if delta < 1 else ()
    told = (Outcome(delta, 0.0, math.inf), Outcome(0.0, delta, -math.inf)) if delta > 0 else ()
    return FiniteOutcomes(common + told, is_attained)


def _zcdp(event: ZCDP, size: int) -> Component | None:
    if event.rho == event.xi == 0:
        return _NOTHING
    if size > 1 and event.xi > 0:
        raise UnsupportedEventError(
            f"no proof for groups of {size} of {event!r}: only guarantees with xi = 0 scale. Account one unit, or "
            "restate the guarantee for groups and compose that."
        )
    rho = event.rho * size * size * (_ROUNDING if size > 1 else 1)
    return None if rho > ranges.MOST_RHO or event.xi > ranges.MOST_EPSILON else Concentrated(rho, event.xi)


def _refuse_sampling(event: Event, rate: float, reason: str) -> None:
    if rate < 1:
        raise UnsupportedEventError(
            f"no proof for Poisson sampling of {event!r}: {reason}. Account it un-sampled, which covers any subset."
        )
