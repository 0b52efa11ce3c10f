"""Plans from a budget: the least noise, the most steps, the largest rate that stay within epsilon at delta.

All end on the safe side: what they return has been checked by the accountant, not extrapolated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from accountants import arguments, queries
from accountants.errors import ParameterError
from accountants.queries import AccountantName
from accountants.relation import NeighboringRelation

TOLERANCE = 2e-6  # relative width of the final bracket around a noise multiplier or a rate
LEAST_NOISE = 1e-2  # below this no float32 training is private in practice, and the search stops
MOST_NOISE = 1e7
LEAST_RATE = 1e-9
MOST_STEPS = 10**10

_ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE


def noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: AccountantName | str = "prv",
    relation: NeighboringRelation | str = _ADD_OR_REMOVE,
) -> float:
    """The least noise multiplier (to about 2e-6 relative) whose certified epsilon is at most `epsilon`.

    Args:
        epsilon: the budget, >= 0.
        delta: in (0, 1).
        sample_rate: probability that an example is in a batch, in [0, 1].
        steps: noisy steps, an int >= 0.
        accountant: as in `interval`.
        relation: the neighbouring relation.

    Returns:
        Noise std / clip norm; 0.0 if nothing is released (no steps, or rate 0). Never below 0.01 otherwise.

    Guarantee:
        epsilon(noise_multiplier=returned, ...) <= epsilon, with the same accountant.

    Raises:
        ParameterError: an argument out of range, or a budget that 1e7 clip norms of noise do not meet.
        UnsupportedEventError: the accountant has no proof for this event under this relation.

    Example:
        >>> sigma = noise_multiplier(epsilon=1.0, delta=1e-5, sample_rate=1.0, steps=1)
        >>> queries.epsilon(noise_multiplier=sigma, delta=1e-5, sample_rate=1.0, steps=1) <= 1.0
        True
    """
    budget, count = arguments.epsilon(epsilon), arguments.steps(steps)
    rate, delta = arguments.sample_rate(sample_rate), arguments.delta(delta)

    def spent(name: str, sigma: float) -> float:
        return queries.interval(
            noise_multiplier=sigma, sample_rate=rate, steps=count, delta=delta, accountant=name, relation=relation
        ).upper

    if count == 0 or rate == 0:
        spent(accountant, 1.0)  # refuses an unknown accountant or relation all the same
        return 0.0
    start = max(rate * math.sqrt(2 * count * math.log(1.25 / delta)) / max(budget, 1e-6), 0.5)
    if accountant != "gdp" and spent("rdp", MOST_NOISE) <= budget:
        start = _least(functools.partial(spent, "rdp"), budget, start, LEAST_NOISE, MOST_NOISE, 3e-2)
    elif (most := spent(accountant, MOST_NOISE)) > budget:
        raise ParameterError(
            f"epsilon {budget!r} is out of reach: noise_multiplier {MOST_NOISE:g} still spends {most:.3g}. "
            "Take fewer steps, or a larger delta or epsilon."
        )
    return _least(functools.partial(spent, accountant), budget, start, LEAST_NOISE, MOST_NOISE, TOLERANCE)


def sample_rate(
    *,
    epsilon: float,
    delta: float,
    noise_multiplier: float,
    steps: int,
    accountant: AccountantName | str = "prv",
    relation: NeighboringRelation | str = _ADD_OR_REMOVE,
) -> float:
    """The largest sample rate (to about 2e-6 relative) whose certified epsilon is at most `epsilon`.

    Arguments as in `noise_multiplier` and `interval`. The expected batch size is the rate times the number of
    examples; round it down.

    Guarantee:
        epsilon(sample_rate=returned, ...) <= epsilon, with the same accountant.

    Raises:
        ParameterError: an argument out of range, or a budget that even a rate of 1e-9 exceeds.
        UnsupportedEventError: the accountant has no proof for this event under this relation.

    Example:
        >>> rate = sample_rate(epsilon=2.0, delta=1e-5, noise_multiplier=1.0, steps=1000)
        >>> 0.0108 < rate < 0.0109
        True
    """
    budget, count, delta = arguments.epsilon(epsilon), arguments.steps(steps), arguments.delta(delta)
    sigma = arguments.noise_scale("noise_multiplier", noise_multiplier)

    def spent(name: str, rate: float) -> float:
        return queries.interval(
            noise_multiplier=sigma, sample_rate=rate, steps=count, delta=delta, accountant=name, relation=relation
        ).upper

    if spent(accountant, 1.0) <= budget:
        return 1.0
    if sigma == 0 or (least := spent(accountant, LEAST_RATE)) > budget:
        raise ParameterError(
            f"epsilon {budget!r} is out of reach: sample_rate {LEAST_RATE:g} at noise_multiplier {sigma!r} still "
            f"spends {math.inf if sigma == 0 else least:.3g}. Add noise, or take fewer steps."
        )
    start = max(budget, 1e-6) * sigma / math.sqrt(2 * count * math.log(1.25 / delta))
    start = 1 / _least(lambda inverse: spent("rdp", 1 / inverse), budget, 1 / start, 1.0, 1 / LEAST_RATE, 1e-2)
    return 1 / _least(lambda inverse: spent(accountant, 1 / inverse), budget, 1 / start, 1.0, 1 / LEAST_RATE, TOLERANCE)


def _least(
    spent: Callable[[float], float], budget: float, start: float, low: float, high: float, tolerance: float
) -> float:
    """The least x in [low, high] with spent(x) <= budget, to `tolerance` relative, from above.

    `spent` falls as x grows, and is known to be within the budget at `high`. Secant steps in log spent against log x
    inside a bracket (bad, good); halvings of it where there is nothing to draw a secant through.
    """
    bad, good = math.log(low) - tolerance, math.log(high)
    trial = min(max(math.log(start), math.log(low)), good)
    slope, previous = -1.0, None  # epsilon is about proportional to 1 / x
    for attempt in range(1, 200):
        value = spent(math.exp(trial))
        if value <= budget:
            good = trial
        else:
            bad = trial
        if good - bad <= tolerance:
            return math.exp(good)
        estimate = None
        if 0 < value < math.inf and budget > 0:
            here = (trial, math.log(value) - math.log(budget))
            if previous is not None and previous[0] != here[0]:
                slope = min((here[1] - previous[1]) / (here[0] - previous[0]), -0.05)
            estimate = here[0] - here[1] / slope
            previous = here
        if estimate is None or attempt % 8 == 0:
            trial = (bad + good) / 2
            continue
        trial = min(max(estimate + tolerance / 3, trial - 2), trial + 2)  # a little to the safe side, not too far
        if trial >= good:  # the good end is nearly the answer: try to bring the bad end up to it
            trial = good - 0.9 * tolerance
        elif trial <= bad:
            trial = bad + 0.9 * tolerance
        if not bad < trial < good:
            trial = (bad + good) / 2
    raise AssertionError("the halvings among 200 steps end in any bracket of doubles")


def steps(
    *,
    epsilon: float,
    delta: float,
    noise_multiplier: float,
    sample_rate: float,
    accountant: AccountantName | str = "prv",
    relation: NeighboringRelation | str = _ADD_OR_REMOVE,
) -> int:
    """The most steps whose certified epsilon is at most `epsilon`; 0 if not even one is.

    Arguments as in `noise_multiplier` and `interval`.

    Guarantee:
        epsilon(steps=returned, ...) <= epsilon, with the same accountant.

    Raises:
        ParameterError: an argument out of range, or a budget that 10 billion steps do not exhaust.
        UnsupportedEventError: the accountant has no proof for this event under this relation.

    Example:
        >>> steps(epsilon=4.4, delta=1e-5, noise_multiplier=10.0, sample_rate=1.0)
        100
    """
    budget, delta = arguments.epsilon(epsilon), arguments.delta(delta)

    def within(name: str, count: int) -> bool:
        spent = queries.interval(
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            steps=count,
            delta=delta,
            accountant=name,
            relation=relation,
        )
        return spent.upper <= budget

    if not within(accountant, 1):
        return 0
    if arguments.sample_rate(sample_rate) == 0:
        raise ParameterError(
            "sample_rate 0 uses no data, so any number of steps is within the budget. Give a rate > 0."
        )
    start = 1 if accountant == "gdp" else max(1, _most(functools.partial(within, "rdp"), 1))
    return _most(functools.partial(within, accountant), start)


def _most(within: Callable[[int], bool], start: int) -> int:
    """The largest count with within(count), by doubling steps away from `start` and then by halves."""
    good, bad, stride = 0, 0, max(1, start // 16)
    if within(start):
        good = start
        while not bad:
            trial = good + stride
            if trial > MOST_STEPS:
                raise ParameterError(
                    f"the budget lasts for more than {MOST_STEPS} steps. Ask for less epsilon, or less noise."
                )
            if within(trial):
                good, stride = trial, stride * 2
            else:
                bad = trial
    else:
        good, bad = 0, start
    while bad - good > 1:
        middle = (good + bad) // 2
        if within(middle):
            good = middle
        else:
            bad = middle
    return good
