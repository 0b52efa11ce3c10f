"""`python -m accountants`: epsilon of a plan, noise for a budget, steps for a budget; a table, or JSON.

`register` mounts the same subcommands on another command's parser. Displayed bounds are rounded to the safe side.
"""

from __future__ import annotations

import argparse
import decimal
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from accountants import queries, solvers
from accountants.accountant import Interval
from accountants.errors import ParameterError, PrivacyError
from accountants.relation import NeighboringRelation

Row = tuple[str, str]

_EXAMPLES = {
    "epsilon": "--noise-multiplier 1.1 --batch-size 256 --dataset-size 60000 --epochs 60 --delta 1e-5",
    "calibrate": "--epsilon 3 --sample-rate 0.01 --steps 10000 --delta 1e-5",
    "steps": "--epsilon 3 --noise-multiplier 1.1 --batch-size 256 --dataset-size 60000 --delta 1e-5 --json",
}


class _OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit code 2, like those of the commands themselves."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for a question that cannot be answered."""
    parser = _OneLineParser(
        prog="python -m accountants",
        description="How much privacy DP-SGD spends, with certified bounds. Batches must be Poisson-sampled.",
        epilog=f"example: python -m accountants epsilon {_EXAMPLES['epsilon']}",
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
    _option(epsilon, "--noise-multiplier", float, "noise std / clip norm", required=True)
    _sampling(epsilon)
    _length(epsilon)
    calibrate = _add(subparsers, "calibrate", "least noise multiplier that keeps to a budget", _calibrate)
    _option(calibrate, "--epsilon", float, "the budget", required=True)
    _sampling(calibrate)
    _length(calibrate)
    steps = _add(subparsers, "steps", "most steps that keep to a budget", _steps)
    _option(steps, "--epsilon", float, "the budget", required=True)
    _option(steps, "--noise-multiplier", float, "noise std / clip norm", required=True)
    _sampling(steps)


def _add(
    subparsers: Any, name: str, purpose: str, answer: Callable[[argparse.Namespace], tuple[dict[str, Any], list[Row]]]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=purpose, description=purpose, epilog=f"example: {name} {_EXAMPLES[name]}"
    )
    _option(parser, "--delta", float, "in (0, 1), well below 1 / dataset size", required=True)
    parser.add_argument("--accountant", default="prv", help="prv (default: certified, tight), rdp or gdp")
    parser.add_argument(
        "--relation",
        default=NeighboringRelation.ADD_OR_REMOVE.value,
        help="neighbouring relation: " + ", ".join(member.value for member in NeighboringRelation),
    )
    parser.add_argument("--json", action="store_true", help="print JSON, numbers unrounded")
    parser.set_defaults(run=lambda arguments: _run(parser.prog, answer, arguments))
    return parser


def _option(parser: argparse.ArgumentParser, flag: str, kind: type, purpose: str, *, required: bool = False) -> None:
    parser.add_argument(flag, type=kind, help=purpose, required=required, metavar=kind.__name__.upper())


def _sampling(parser: argparse.ArgumentParser) -> None:
    _option(parser, "--sample-rate", float, "probability that an example is in a batch")
    _option(parser, "--batch-size", int, "expected batch size; with --dataset-size, in place of --sample-rate")
    _option(parser, "--dataset-size", int, "number of examples, taken as public")


def _length(parser: argparse.ArgumentParser) -> None:
    _option(parser, "--steps", int, "noisy steps")
    _option(parser, "--epochs", int, "in place of --steps: ceil(dataset size / batch size) steps each")


def _run(
    prog: str,
    answer: Callable[[argparse.Namespace], tuple[dict[str, Any], list[Row]]],
    arguments: argparse.Namespace,
) -> int:
    try:
        record, rows = answer(arguments)
    except PrivacyError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        # Infinity is not JSON: a plan without privacy has epsilon null.
        print(json.dumps({k: None if v == math.inf else v for k, v in record.items()}))
    else:
        width = max(len(label) for label, _ in rows)
        print("\n".join(f"{label:<{width}}  {value}" for label, value in rows))
    return 0


def _epsilon(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    plan = _rate(arguments) | {"steps": _step_count(arguments), "noise_multiplier": arguments.noise_multiplier}
    return _report(arguments, plan, [])


def _calibrate(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    plan = _rate(arguments) | {"steps": _step_count(arguments)}
    sigma = solvers.noise_multiplier(epsilon=arguments.epsilon, **plan, **_common(arguments))
    return _report(arguments, plan | {"noise_multiplier": sigma}, [("budget", f"epsilon {arguments.epsilon!r}")])


def _steps(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    plan = _rate(arguments) | {"noise_multiplier": arguments.noise_multiplier}
    count = solvers.steps(epsilon=arguments.epsilon, **plan, **_common(arguments))
    return _report(arguments, plan | {"steps": count}, [("budget", f"epsilon {arguments.epsilon!r}")])


def _report(arguments: argparse.Namespace, plan: dict[str, Any], extra: list[Row]) -> tuple[dict[str, Any], list[Row]]:
    interval = queries.interval(**plan, **_common(arguments))
    relation = NeighboringRelation.of(arguments.relation)
    record = {
        "epsilon": interval.upper,
        "epsilon_lower": interval.lower,
        "delta": arguments.delta,
        **plan,
        "sampling": "poisson",
        "relation": relation.value,
        "accountant": arguments.accountant,
    }
    rows = [
        ("epsilon", _bounds(interval)),
        ("delta", repr(arguments.delta)),
        ("noise multiplier", _rounded(plan["noise_multiplier"], decimal.ROUND_CEILING, 6)),
        ("steps", str(plan["steps"])),
        ("sampling", f"Poisson, rate {plan['sample_rate']:.6g}"),
        ("relation", relation.phrase),
        ("accountant", arguments.accountant),
    ]
    return record, rows + extra


def _common(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"delta": arguments.delta, "accountant": arguments.accountant, "relation": arguments.relation}


def _rate(arguments: argparse.Namespace) -> dict[str, Any]:
    batch, size = arguments.batch_size, arguments.dataset_size
    if arguments.sample_rate is not None:
        if batch is not None:
            raise ParameterError("--sample-rate and --batch-size say the same thing twice. Give one of them.")
        return {"sample_rate": arguments.sample_rate}
    if batch is None or size is None:
        raise ParameterError("the sampling is missing. Give --sample-rate, or --batch-size with --dataset-size.")
    if not 1 <= batch <= size:
        raise ParameterError(f"--batch-size must be from 1 to --dataset-size {size}, got {batch}. Check the two.")
    return {"sample_rate": batch / size}


def _step_count(arguments: argparse.Namespace) -> int:
    if (arguments.steps is None) == (arguments.epochs is None):
        raise ParameterError("give either --steps or --epochs (one of the two, not both).")
    if arguments.steps is not None:
        return int(arguments.steps)
    batch, size = arguments.batch_size, arguments.dataset_size
    if batch is None or size is None:
        raise ParameterError("--epochs needs whole numbers to count steps from. Give --batch-size and --dataset-size.")
    return int(arguments.epochs * -(-size // batch))


def _bounds(interval: Interval) -> str:
    if interval.upper == math.inf:
        return "infinite: no privacy"
    upper = _rounded(interval.upper, decimal.ROUND_CEILING, 5)
    return f"<= {upper}, and not below {_rounded(interval.lower, decimal.ROUND_FLOOR, 5)}"


def _rounded(value: float, direction: str, digits: int) -> str:
    """`value` to `digits` significant digits, up or down, without an exponent for everyday sizes."""
    if value == 0 or math.isinf(value):
        return "0" if value == 0 else "inf"
    short = decimal.Context(prec=digits, rounding=direction).create_decimal(decimal.Decimal(repr(value)))
    return f"{short:f}" if 1e-6 < value < 1e9 else str(short)
