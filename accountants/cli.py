"""`python -m accountants`: what a plan spends, what it may cost, and what that means; a table, JSON, or a figure.

    epsilon     what a plan spends
    calibrate   the least noise that keeps to a budget
    steps       the most steps that keep to a budget
    rate        the largest sampling rate that keeps to a budget
    curve       epsilon over the steps of a plan
    explain     what an attacker could learn from a plan's release

`register` mounts the same subcommands on another command's parser. Displayed bounds are rounded to the safe side.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from accountants import queries, solvers
from accountants.commands import curve_command, explain_command, plan_options
from accountants.commands.answer import Answer, aligned
from accountants.commands.one_line_parser import OneLineParser
from accountants.commands.plot_option import add_plot
from accountants.commands.rounding import bounds, rounded_up
from accountants.errors import PrivacyError
from accountants.relation import NeighboringRelation

_EXAMPLES = {
    "epsilon": "--noise-multiplier 1.1 --batch-size 256 --dataset-size 60000 --epochs 60 --delta 1e-5",
    "calibrate": "--epsilon 3 --sample-rate 0.01 --steps 10000 --delta 1e-5",
    "steps": "--epsilon 3 --noise-multiplier 1.1 --batch-size 256 --dataset-size 60000 --delta 1e-5 --json",
    "rate": "--epsilon 3 --noise-multiplier 1.1 --steps 10000 --dataset-size 60000 --delta 1e-5",
    "curve": "--noise-multiplier 1.1 --sample-rate 0.01 --steps 10000 --delta 1e-5 --points 10 --plot epsilon.png",
    "explain": "--noise-multiplier 1.1 --batch-size 256 --dataset-size 60000 --epochs 60 --delta 1e-5",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for a question that cannot be answered."""
    parser = OneLineParser(
        prog="python -m accountants",
        description="How much privacy DP-SGD spends, with certified bounds. Batches must be Poisson-sampled.",
        epilog=f"example: %(prog)s epsilon {_EXAMPLES['epsilon']}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    register(parser.add_subparsers(title="commands", required=True, metavar="command"))
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


def register(subparsers: Any) -> None:
    """Add the subcommands; each sets `run`, a callable from the parsed namespace to the exit code.

    Args:
        subparsers: what `ArgumentParser.add_subparsers` returned (argparse gives that type no public name).
    """
    epsilon = _add(subparsers, "epsilon", "epsilon that a plan spends", _epsilon)
    calibrate = _add(subparsers, "calibrate", "least noise multiplier that keeps to a budget", _calibrate)
    steps = _add(subparsers, "steps", "most steps that keep to a budget", _steps)
    rate = _add(subparsers, "rate", "largest sampling rate that keeps to a budget", _rate)
    curve = _add(subparsers, "curve", "epsilon over the steps of a plan", curve_command.answer)
    explain = _add(subparsers, "explain", "what an attacker could learn from a plan's release", explain_command.answer)
    for parser in (calibrate, steps, rate):
        plan_options.add_budget(parser)
    for parser in (epsilon, steps, rate, curve, explain):
        plan_options.add_noise(parser)
    for parser in (epsilon, calibrate, steps, curve, explain):
        plan_options.add_sampling(parser)
    for parser in (epsilon, calibrate, curve, explain):
        plan_options.add_length(parser)
    plan_options.add(rate, "--steps", int, "noisy steps", required=True)
    plan_options.add(rate, "--dataset-size", int, "number of examples, to give the batch size too")
    plan_options.add(curve, "--points", int, f"numbers of steps to show, {curve_command.POINTS} by default")
    add_plot(curve, "epsilon over steps")
    add_plot(explain, "the trade-off curve")


def _add(
    subparsers: Any, name: str, purpose: str, answer: Callable[[argparse.Namespace], Answer]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=purpose,
        description=purpose,
        epilog=f"example: %(prog)s {_EXAMPLES[name]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # an example on one line can be pasted
    )
    plan_options.add_common(parser)
    parser.set_defaults(run=lambda arguments: _run(parser.prog, name, answer, arguments))
    return parser


def _run(prog: str, name: str, answer: Callable[[argparse.Namespace], Answer], arguments: argparse.Namespace) -> int:
    try:
        found = answer(arguments)
    except PrivacyError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    document = {"schema": f"accountants.{name}/1", **found.document()}
    print(json.dumps(document, allow_nan=False) if arguments.json else found.text)
    return 0


def _epsilon(arguments: argparse.Namespace) -> Answer:
    return _spent(arguments, plan_options.plan(arguments))


def _calibrate(arguments: argparse.Namespace) -> Answer:
    plan = plan_options.rate(arguments) | {"steps": plan_options.step_count(arguments)}
    sigma = solvers.noise_multiplier(epsilon=arguments.epsilon, **plan, **plan_options.common(arguments))
    return _spent(arguments, plan | {"noise_multiplier": sigma})


def _steps(arguments: argparse.Namespace) -> Answer:
    plan = plan_options.rate(arguments) | {"noise_multiplier": arguments.noise_multiplier}
    count = solvers.steps(epsilon=arguments.epsilon, **plan, **plan_options.common(arguments))
    return _spent(arguments, plan | {"steps": count})


def _rate(arguments: argparse.Namespace) -> Answer:
    plan = {"noise_multiplier": arguments.noise_multiplier, "steps": arguments.steps}
    rate = solvers.sample_rate(epsilon=arguments.epsilon, **plan, **plan_options.common(arguments))
    sizes = {}
    if arguments.dataset_size is not None:
        sizes["batch_size"] = plan_options.whole_batch(rate, arguments.dataset_size)
    return _spent(arguments, {"sample_rate": rate} | plan, sizes)


def _spent(arguments: argparse.Namespace, plan: dict[str, Any], sizes: dict[str, int] | None = None) -> Answer:
    """Epsilon of a plan that is complete."""
    interval = queries.interval(**plan, **plan_options.common(arguments))
    relation = NeighboringRelation.of(arguments.relation)
    record = {
        "epsilon": interval.upper,
        "epsilon_lower": interval.lower,
        "delta": arguments.delta,
        **plan,
        **(sizes or {}),
        "sampling": "poisson",
        "relation": relation.value,
        "accountant": arguments.accountant,
    }
    if "epsilon" in arguments:
        record["budget_epsilon"] = arguments.epsilon
    rows = [
        ("epsilon", bounds(interval)),
        ("delta", repr(arguments.delta)),
        ("noise multiplier", rounded_up(plan["noise_multiplier"], 6)),
        ("steps", str(plan["steps"])),
        ("sampling", plan_options.sampling_phrase(plan["sample_rate"])),
        *(("batch size", f"{size} expected") for size in (sizes or {}).values()),
        ("relation", relation.phrase),
        ("accountant", arguments.accountant),
    ]
    if "epsilon" in arguments:
        rows.append(("budget", f"epsilon {arguments.epsilon!r}"))
    return Answer(record, aligned(rows))
