"""What looking at the rows of a sweep costs, in numbers and in the words that stand in each of its outputs.

The epsilon of a row is that of one run. Whoever publishes all rows, or picks one by looking at all, has released
something that depends on all runs: their composition bounds what that costs. A run that was begun counts, whatever
became of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import accountants
from accountants import Event, NeighboringRelation
from dpdl.plan import PrivacyPlan
from dpdl.privacy_report import rounded_up, shown_delta
from dpdl.tradeoff.grid import Grid
from dpdl.tradeoff.point import Point

__all__ = ["epsilon_of_all", "remarks_on_a_sweep", "remarks_on_scores"]


def epsilon_of_all(plans: Sequence[tuple[PrivacyPlan, int]], *, delta: float) -> float:
    """Upper bound at `delta` on publishing all runs: each plan as often as it was begun.

    Args:
        plans: of one neighbouring relation, with the number of runs of each; without noise the answer is infinite.
        delta: in (0, 1).
    """
    counts: dict[Event, int] = {}
    relation = NeighboringRelation.ADD_OR_REMOVE
    for plan, times in plans:
        if times:
            step, relation = plan.event(1), NeighboringRelation(plan.relation)
            counts[step] = counts.get(step, 0) + times * plan.steps
    accountant: accountants.Accountant = accountants.PRVAccountant(relation=relation)
    for step, count in counts.items():
        accountant = accountant.compose(step, count)
    return accountant.interval(delta).upper


def remarks_on_a_sweep(
    grid: Grid, points: Sequence[Point], begun: Mapping[str, int], epsilon: float
) -> tuple[str, ...]:
    """What a reader of the rows must know.

    Args:
        grid: what was asked.
        points: its runs.
        begun: how often each was begun, by key.
        epsilon: of all private runs together.
    """
    private = [point for point in points if point.private and begun.get(point.key)]
    runs = sum(begun[point.key] for point in private)
    again = f" (begun {runs} times in all)" if runs > len(private) else ""
    delta = shown_delta(grid.delta)
    found = [
        f"each epsilon is of that run alone, at delta = {delta}",
        f"picking the best of the {len(private)} private rows by looking at their scores, or publishing them all, "
        f"costs up to epsilon <= {rounded_up(epsilon)} at delta = {delta} for all these runs together{again}, and is "
        "in none of these epsilons, unless the pick is made by private selection (select=, --select); other sweeps of "
        "the same data add to it",
        *remarks_on_scores(grid),
    ]
    if any(not point.private and begun.get(point.key) for point in points):
        found.append(
            "the non-private line has no guarantee, and its scores depend on the training records; if these are "
            "secret, do not publish it, or sweep without it (baseline=False, --no-baseline)"
        )
    return tuple(found)


def remarks_on_scores(grid: Grid) -> tuple[str, ...]:
    """Whose records scores are of, and whether the noise is."""
    if grid.held_out == "public":
        scores = "scores are of held-out records that are taken as public: they are no part of any epsilon"
    else:
        scores = "scores are exact numbers of held-out records, which no epsilon here protects"
    if grid.insecure_seed is None:
        return (scores,)
    return (
        scores,
        "noise and sampling came from insecure_seed: whoever knows the seed can remove the noise, so each claim holds "
        "only against those who do not",
    )
