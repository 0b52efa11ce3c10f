"""Plans from a budget: the least noise, or the most steps, that stays within epsilon at delta.

Both end on the safe side: what they return has been checked by the accountant, not extrapolated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from accountants import arguments, queries
from accountants.errors import ParameterError
from accountants.queries import AccountantName
from accountants.relation import NeighboringRelation

TOLERANCE = 2e-4  # relative width of the final bracket around the noise multiplier
LEAST_NOISE = 1e-2  # below this no float32 training is private in practice, and the search stops
MOST_NOISE = 1e7
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
    """The least noise multiplier (to about 2e-4 relative) whose certified epsilon is at most `epsilon`.

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
        return queries.epsilon(
            noise_multiplier=sigma, sample_rate=rate, steps=count, delta=delta, accountant=name, relation=relation
        )

    if count == 0 or rate == 0:
        spent(accountant, 1.0)  # refuses an unknown accountant or relation all the same
        return 0.0
    start = rate * math.sqrt(2 * count * math.log(1.25 / delta)) / max(budget, 1e-6)
    quick = functools.partial(spent, "rdp")
    if accountant != "gdp" and quick(MOST_NOISE) <= budget:
        start = _least(quick, budget, start, 1e-2)
    return _least(functools.partial(spent, accountant), budget, start, TOLERANCE)


def _least(spent: Callable[[float], float], budget: float, start: float, tolerance: float) -> float:
    """The least sigma in [LEAST_NOISE, MOST_NOISE] with spent(sigma) <= budget, within `tolerance`, from above.

    Epsilon falls about as 1 / sigma: steps on that assumption until the budget is bracketed by (bad, good), then
    secant steps in log epsilon against log sigma, by halves where those fail.
    """
    good, bad, good_value, bad_value = math.inf, 0.0, 0.0, math.inf
    trial, stretch = min(max(start, LEAST_NOISE), MOST_NOISE), 1 + 4 * tolerance
    for attempt in range(200):
        value = spent(trial)
        if value <= budget:
            good, good_value = trial, value
        else:
            bad, bad_value = trial, value
        if good <= max(bad * (1 + tolerance), LEAST_NOISE):
            return good
        if bad >= MOST_NOISE:
            raise ParameterError(
                f"epsilon {budget!r} is out of reach: noise_multiplier {MOST_NOISE:g} still spends {bad_value:.3g}. "
                "Take fewer steps, or a larger delta or epsilon."
            )
        ratio = value / budget if budget > 0 and 0 < value < math.inf else 0.0
        if math.isinf(good):
            trial = min(trial * (max(ratio, 1.0) if 0 < ratio < 2 else 2.0) * stretch, MOST_NOISE)
            stretch *= stretch
        elif bad == 0:
            trial = max(trial * (min(ratio, 1.0) if ratio > 0.5 else 0.5) / stretch, LEAST_NOISE)
            stretch *= stretch
        else:
            secant = _secant(bad, bad_value, good, good_value, budget, tolerance) if attempt % 4 else None
            trial = secant or math.sqrt(bad * good)
    raise AssertionError("200 steps halve any bracket of doubles below the tolerance")


def _secant(
    bad: float, bad_value: float, good: float, good_value: float, budget: float, tolerance: float
) -> float | None:
    """Where the line through both ends meets the budget, a little to the safe side; None if there is no line."""
    if not (0 < good_value < bad_value < math.inf and budget > 0):
        return None
    share = (math.log(bad_value) - math.log(budget)) / (math.log(bad_value) - math.log(good_value))
    trial = math.exp(math.log(bad) + share * (math.log(good) - math.log(bad))) * (1 + tolerance / 3)
    if trial >= good:  # the good end is nearly the answer: try to bring the bad end up to it
        trial = good / (1 + tolerance * 0.9)
    return trial if bad < trial < good else None


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
        spent = queries.epsilon(
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            steps=count,
            delta=delta,
            accountant=name,
            relation=relation,
        )
        return spent <= budget

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
