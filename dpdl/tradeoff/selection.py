"""Choosing the best of several private runs privately: how many are made is drawn at random, and stays secret.

    1. K, the number of runs, is drawn from a law that does not depend on the data.
    2. Each run draws its settings uniformly from the public list of candidates, trains, and computes its score on
       records that are not private, so that the score is post-processing of what the run released. It also draws a
       number that breaks ties.
    3. The run with the largest score is published, and nothing else: not K, not the other runs, nor how long it took.

A run together with its random choice is one mechanism; as the choice is published with its result, its Rényi moments
are the mean of the candidates' moments, hence its divergence at each order is at most the largest of the candidates'.
From there [1, Theorems 2 and 6], as `accountants.Repetitions` has them; the first of this kind is [2].

References:
    [1] Papernot, Steinke, Hyperparameter Tuning with Rényi Differential Privacy, 2022. arXiv:2110.03620
    [2] Liu, Talwar, Private Selection from Private Candidates, 2019. arXiv:1811.07971
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from accountants import NeighboringRelation, Repetitions
from accountants.best_moment import best_moment
from accountants.engines.renyi_bound import ROUNDING, epsilon_proved
from accountants.rdp_accountant import rdp
from dpdl.errors import CheckpointError, ParameterError
from dpdl.plan import PrivacyPlan
from dpdl.privacy_report import rounded_up, shown_delta
from dpdl.tradeoff.grid import Grid, seed_of_its_own
from dpdl.tradeoff.looking import remarks_on_scores
from dpdl.tradeoff.point import Point
from dpdl.tradeoff.row import Row

__all__ = ["Selection", "best", "draw", "epsilon_of_selection", "refuse_damaged_draw", "runs_drawn", "within_budget"]

_TIE_BITS = 53
_CLOSE = 1.001  # how near to the largest epsilon of one run the search ends


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The claim of a run that was chosen privately.

    Attributes:
        epsilon: upper bound at `delta` on the published run, the choice included.
        delta: at which.
        epsilon_of_one_run: the largest of the candidates', were there no choice.
        mean, shape: the law of the number of runs; `accountants.Repetitions` has what they mean.
        candidates: how many settings there were to draw from.
        chosen: the published run; None if none was made (which a Poisson law allows), or all failed.

    References:
        Papernot, Steinke, 2022. arXiv:2110.03620; Liu, Talwar, 2019. arXiv:1811.07971 (the module has both).
    """

    epsilon: float
    delta: float
    epsilon_of_one_run: float
    mean: float
    shape: float
    candidates: int
    chosen: Row | None

    def __str__(self) -> str:
        return (
            f"epsilon <= {rounded_up(self.epsilon)} at delta = {shown_delta(self.delta)} for the published run and its "
            f"choice among {self.candidates} candidates (one run alone: <= {rounded_up(self.epsilon_of_one_run)})"
        )

    def remarks(self, grid: Grid) -> tuple[str, ...]:
        """What a reader of the claim over a grid must know."""
        return (
            str(self),
            "the choice is accounted by the theorem of Papernot and Steinke (2022) for a random number of runs, mean "
            f"{self.mean:g}; it holds if only the chosen run is published: how many runs there were, the other runs, "
            "and how long it took stay secret",
            *remarks_on_scores(grid),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinity is the string "inf"."""
        values = {**asdict(self), "chosen": None if self.chosen is None else self.chosen.to_dict(), "claim": str(self)}
        return {name: "inf" if value == math.inf else value for name, value in values.items()}


def epsilon_of_selection(plans: Sequence[PrivacyPlan], repetitions: Repetitions, *, delta: float) -> float:
    """Upper bound at `delta` on the best of a random number of runs, each of a plan drawn from `plans`.

    Args:
        plans: of the candidates, all under one neighbouring relation.
        repetitions: the law of the number of runs.
        delta: in (0, 1).

    Guarantee:
        As in the module, if each run's score is a function of what the run released and of data that is not private.

    Example:
        >>> plan = PrivacyPlan(sample_rate=0.01, expected_batch_size=60, steps=1000, noise_multiplier=1.0,
        ...                    max_grad_norm=1.0)
        >>> round(epsilon_of_selection([plan], Repetitions(mean=20, shape=0.0), delta=1e-5), 2)
        3.77

    References:
        Papernot, Steinke, 2022. arXiv:2110.03620; Liu, Talwar, 2019. arXiv:1811.07971 (the module has both).
    """
    relation = NeighboringRelation(plans[0].relation)
    events = list(dict.fromkeys(plan.event() for plan in plans))

    def worst(orders: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.max([rdp(event, orders, relation=relation) for event in events], axis=0)  # type: ignore[no-any-return]

    def proved(t: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        moments = t * repetitions.rdp(worst, np.nextafter(1 + t, np.inf))
        return epsilon_proved(moments, t, math.log(delta))

    _, value = best_moment(proved)
    return math.inf if math.isnan(value) else max(0.0, value + ROUNDING * (1 + abs(value)))


def within_budget(grid: Grid, repetitions: Repetitions) -> Grid:
    """The grid whose single runs leave room for the choice: all together within the one epsilon that was asked.

    Raises:
        ParameterError: there is not exactly one epsilon, or no noise is enough for it.
    """
    if len(grid.epsilons) != 1:
        raise ParameterError(
            f"select needs one epsilon, the budget of run and choice together, got epsilons={grid.epsilons}: the best "
            "over several budgets is the largest. Choose one, or select for each in a sweep of its own."
        )
    budget = grid.epsilons[0]

    def fits(one: float) -> bool:
        plans = [point.plan for point in replace(grid, epsilons=(one,)).points()]
        return epsilon_of_selection(plans, repetitions, delta=grid.delta) <= budget

    low, high = budget / 2, budget
    while not fits(low):  # ends at a plan that fits, or at one for which no noise is enough, which is an error
        low, high = low / 2, low
    while high > _CLOSE * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return replace(grid, epsilons=(low,))


def draw(candidates: int, repetitions: Repetitions, insecure_seed: int | None) -> dict[str, Any]:
    """Which candidates run, and what breaks their ties: secret, and drawn before anything else."""
    if insecure_seed is None:
        below: Callable[[int], int] = secrets.randbelow
        count = repetitions.draw()
    else:
        rng = np.random.default_rng(seed_of_its_own(insecure_seed, "selection"))
        count = repetitions.draw(insecure_rng=rng)

        def below(bound: int) -> int:
            return int(rng.integers(bound))

    return {
        "picks": [below(candidates) for _ in range(count)],
        "ties": [below(2**_TIE_BITS) for _ in range(count)],
    }


def refuse_damaged_draw(drawn: dict[str, Any], candidates: int) -> None:
    """Check what a journal holds of a draw.

    Raises:
        CheckpointError: it is not what `draw` gives for so many candidates.
    """
    found = [drawn.get(name) for name in ("picks", "ties")]
    bounds = (candidates, 2**_TIE_BITS)
    whole = all(
        isinstance(values, list) and all(type(value) is int and 0 <= value < bound for value in values)
        for values, bound in zip(found, bounds, strict=True)
    )
    if not whole or len({len(values) for values in found if isinstance(values, list)}) != 1:
        raise CheckpointError("What the sweep drew is damaged in its journal. Start anew in another output.")


def runs_drawn(candidates: Sequence[Point], drawn: dict[str, Any], insecure_seed: int | None) -> tuple[Point, ...]:
    """The runs to make: a candidate drawn twice runs twice, with noise of its own."""
    found = []
    for number, pick in enumerate(drawn["picks"]):
        point = replace(candidates[pick], key=f"run-{number}")
        if insecure_seed is not None:
            own = seed_of_its_own(insecure_seed, point.key)
            point = replace(point, execution=replace(point.execution, insecure_seed=own))
        found.append(point)
    return tuple(found)


def best(points: Sequence[Point], rows: dict[str, Row], drawn: dict[str, Any]) -> Row | None:
    """The run with the largest score, ties broken by what each drew; a run that failed is below all others."""
    scored = [
        (row.score, tie, row.key)
        for point, tie in zip(points, drawn["ties"], strict=True)
        if (row := rows[point.key]).score is not None
    ]
    return rows[max(scored)[2]] if scored else None
