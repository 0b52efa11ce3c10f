"""`curve`: epsilon over the steps of a plan."""

from __future__ import annotations

import argparse
from typing import Any

from accountants import queries
from accountants.commands import plan_options
from accountants.commands.answer import Answer, aligned
from accountants.commands.figure import plot_epsilon
from accountants.commands.plot_option import refuse_what_cannot_be_drawn
from accountants.commands.rounding import rounded_up
from accountants.errors import ParameterError
from accountants.relation import NeighboringRelation

POINTS = 20
_MOST_POINTS = 10_000


def answer(arguments: argparse.Namespace) -> Answer:
    """Upper bounds on epsilon at evenly spaced numbers of steps, the plan's own number last.

    Raises:
        PrivacyError: the plan or the number of points makes no sense, no proof is known, or the plot cannot be drawn.
    """
    refuse_what_cannot_be_drawn(arguments.plot)
    plan = plan_options.plan(arguments)
    points = POINTS if arguments.points is None else arguments.points
    if not 1 <= points <= _MOST_POINTS:
        raise ParameterError(f"--points must be from 1 to {_MOST_POINTS}, got {points}. Give for example 20.")
    common = plan_options.common(arguments)
    relation = NeighboringRelation.of(arguments.relation)
    queries.interval(**plan, **common)  # refuses what can only be estimated, which the curve would not show
    total = plan.pop("steps")
    steps = sorted({-(-total * point // points) for point in range(1, points + 1)})
    epsilons = queries.epsilon_curve(**plan, steps=steps, **common).tolist()
    if arguments.plot is not None:
        plot_epsilon(steps, epsilons, delta=arguments.delta, relation=relation, path=arguments.plot)
    record: dict[str, Any] = {
        "steps": steps,
        "epsilon": epsilons,
        "delta": arguments.delta,
        **plan,
        "sampling": "poisson",
        "relation": relation.value,
        "accountant": arguments.accountant,
    }
    rows = [("steps", "epsilon <="), *((str(n), rounded_up(e)) for n, e in zip(steps, epsilons, strict=True))]
    facts = [
        ("delta", repr(arguments.delta)),
        ("noise multiplier", rounded_up(plan["noise_multiplier"], 6)),
        ("sampling", plan_options.sampling_phrase(plan["sample_rate"])),
        ("relation", relation.phrase),
        ("accountant", arguments.accountant),
    ]
    return Answer(record, f"{aligned(rows, numeric=True)}\n\n{aligned(facts)}")
