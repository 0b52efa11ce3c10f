"""`explain`: what an attacker could learn from a plan's release, in words and numbers.

Every number bounds from above an attacker who sees each noisy step, knows every other example and has unlimited time.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from accountants import queries
from accountants.commands import plan_options
from accountants.commands.answer import Answer, aligned
from accountants.commands.figure import plot_trade_off
from accountants.commands.plot_option import refuse_what_cannot_be_drawn
from accountants.commands.rounding import bounds, percent_up, rounded_up
from accountants.events import Event, Group
from accountants.interval import Interval
from accountants.meaning import attacks
from accountants.meaning.trade_off_curve import spent_by, trade_off
from accountants.relation import NeighboringRelation

_FALSE_POSITIVE_RATES = (1e-2, 1e-3)
_PRIORS = (0.5, 0.01)
_FAILURE = 1e-3  # probability left out of the bound on the posterior
_BASELINES = (1e-2, 1e-4)
_GROUPS = (2, 5)  # examples protected together
_PLOTTED = 401  # points of the plotted curve


def answer(arguments: argparse.Namespace) -> Answer:
    """Epsilon, the bounds of `attacks`, and epsilon of groups, for a plan.

    Raises:
        PrivacyError: the plan makes no sense, no proof is known, or the plot cannot be drawn.
    """
    refuse_what_cannot_be_drawn(arguments.plot)
    plan = plan_options.plan(arguments)
    relation = NeighboringRelation.of(arguments.relation)
    event = queries.dpsgd(**plan)
    asked: dict[str, Any] = {"accountant": arguments.accountant, "relation": relation}
    interval = queries.interval(**plan, **plan_options.common(arguments))
    record: dict[str, Any] = {
        "epsilon": interval.upper,
        "epsilon_lower": interval.lower,
        "delta": arguments.delta,
        **plan,
        "sampling": "poisson",
        "relation": relation.value,
        "accountant": arguments.accountant,
        "advantage": attacks.advantage(event, **asked),
        "true_positive_rates": _pairs(
            "false_positive_rate",
            _FALSE_POSITIVE_RATES,
            "true_positive_rate",
            attacks.tpr_at_fpr(event, _FALSE_POSITIVE_RATES, **asked).tolist(),
        ),
        "priors": [_at_prior(event, prior, asked) for prior in _PRIORS],
        "reconstruction": _pairs(
            "baseline", _BASELINES, "success", attacks.reconstruction(event, _BASELINES, **asked).tolist()
        ),
        "groups": [_group(event, size, arguments.delta, asked) for size in _GROUPS],
    }
    if arguments.plot is not None:
        alpha = np.linspace(0, 1, _PLOTTED) ** 2  # denser where false positives are few
        plot_trade_off(
            alpha,
            trade_off(event, alpha, **asked),
            relation=relation,
            title=f"epsilon {bounds(interval)}, at delta {arguments.delta!r}",
            path=arguments.plot,
        )
    return Answer(record, _text(record, bounds(interval), relation))


def _pairs(asked: str, values: tuple[float, ...], bounded: str, bound: list[float]) -> list[dict[str, float]]:
    return [{asked: value, bounded: at_most} for value, at_most in zip(values, bound, strict=True)]


def _at_prior(event: Event, prior: float, asked: dict[str, Any]) -> dict[str, Any]:
    values = attacks.positive_predictive_value(event, prior, _FALSE_POSITIVE_RATES, **asked).tolist()
    return {
        "prior": prior,
        "positive_predictive_values": _pairs(
            "false_positive_rate", _FALSE_POSITIVE_RATES, "positive_predictive_value", values
        ),
        "bayes_accuracy": attacks.bayes_accuracy(event, prior, **asked),
        "posterior": attacks.posterior(event, prior, failure=_FAILURE, **asked),
        "posterior_failure": _FAILURE,
    }


def _group(event: Event, size: int, delta: float, asked: dict[str, Any]) -> dict[str, Any]:
    interval = spent_by(Group(event, size), **asked).interval(delta)
    return {"size": size, "epsilon": interval.upper, "epsilon_lower": interval.lower}


def _text(record: dict[str, Any], epsilon: str, relation: NeighboringRelation) -> str:
    noise = rounded_up(record["noise_multiplier"], 6)
    plan = [
        ("released", f"{record['steps']} noisy steps, noise multiplier {noise}"),
        ("sampling", plan_options.sampling_phrase(record["sample_rate"])),
        ("protected", f"{relation.phrase}; by the accountant {record['accountant']!r}"),
        ("epsilon", f"{epsilon}, at delta {record['delta']!r}"),
    ]
    rows = [
        (f"recovered, where a blind guess succeeds in {_exact(at['baseline'])}", percent_up(at["success"]))
        for at in record["reconstruction"]
    ]
    groups = aligned(
        [
            (f"  epsilon of any {group['size']}", bounds(Interval(group["epsilon_lower"], group["epsilon"])))
            for group in record["groups"]
        ]
    )
    parts = [
        aligned(plan),
        "No attacker can do better than this, not even one who sees every step and knows every other example.",
        _section("Was this example in the data?", _membership(record)),
        *(
            _section(f"The same, if {_exact(at['prior'])} of the candidates were in the data:", _prior(at))
            for at in record["priors"]
        ),
        _section("What was in this example?", rows),
        f"Examples that belong together, at delta {record['delta']!r}\n{groups}",
    ]
    return "\n\n".join(parts)


def _membership(record: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (
            f"members found, if {_exact(at['false_positive_rate'])} of the others are accused",
            percent_up(at["true_positive_rate"]),
        )
        for at in record["true_positive_rates"]
    ]
    return [("true minus false positive rate (advantage)", percent_up(record["advantage"])), *rows]


def _prior(at: dict[str, Any]) -> list[tuple[str, str]]:
    blind = max(at["prior"], 1 - at["prior"])
    rows = [
        (
            f"accusations that are right, if {_exact(value['false_positive_rate'])} of the others are accused",
            percent_up(value["positive_predictive_value"]),
        )
        for value in at["positive_predictive_values"]
    ]
    return [
        *rows,
        (f"right guesses (without looking: {_exact(blind)})", percent_up(at["bayes_accuracy"], digits=6)),
        (f"certainty reached, but for {_exact(at['posterior_failure'])} of all runs", percent_up(at["posterior"])),
    ]


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    lines = aligned([(f"  {label}", f"at most {value}") for label, value in rows])
    return f"{title}\n{lines}"


def _exact(share: float) -> str:
    return f"{100 * share:.6g} %"
