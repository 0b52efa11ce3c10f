"""The options that describe a DP-SGD plan on a command line, and the plan they describe."""

from __future__ import annotations

import argparse
import math
from fractions import Fraction
from typing import Any, get_args

from accountants.commands.rounding import rounded_down
from accountants.errors import ParameterError
from accountants.queries import AccountantName
from accountants.relation import NeighboringRelation


def add_common(parser: argparse.ArgumentParser) -> None:
    """Delta, accountant, relation, and JSON: what every question needs."""
    add(parser, "--delta", float, "in (0, 1), well below 1 / dataset size", required=True)
    parser.add_argument(
        "--accountant",
        default="prv",
        help=f"{', '.join(get_args(AccountantName))}; %(default)s, certified and tight, by default",
    )
    parser.add_argument(
        "--relation",
        default=NeighboringRelation.ADD_OR_REMOVE.value,
        help="neighbouring relation: " + ", ".join(member.value for member in NeighboringRelation),
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help='print JSON, numbers unrounded; an infinite one is null, and "unbounded" says whether any is',
    )


def add_budget(parser: argparse.ArgumentParser) -> None:
    """The epsilon to keep to."""
    add(parser, "--epsilon", float, "the budget", required=True)


def add_noise(parser: argparse.ArgumentParser) -> None:
    """The noise multiplier."""
    add(parser, "--noise-multiplier", float, "noise std / clip norm", required=True)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The sampling rate, or the sizes that give it."""
    add(parser, "--sample-rate", float, "probability that an example is in a batch")
    add(parser, "--batch-size", int, "expected batch size; with --dataset-size, in place of --sample-rate")
    add(parser, "--dataset-size", int, "number of examples, taken as public")


def add_length(parser: argparse.ArgumentParser) -> None:
    """The number of steps, or of epochs."""
    add(parser, "--steps", int, "noisy steps")
    add(parser, "--epochs", int, "in place of --steps: ceil(dataset size / batch size) steps each")


def add(parser: argparse.ArgumentParser, flag: str, kind: type, purpose: str, *, required: bool = False) -> None:
    """One option, its type as the placeholder in the help."""
    parser.add_argument(flag, type=kind, help=purpose, required=required, metavar=kind.__name__.upper())


def common(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments that every query takes."""
    return {"delta": arguments.delta, "accountant": arguments.accountant, "relation": arguments.relation}


def plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `dpsgd`.

    Raises:
        ParameterError: the options contradict each other, or leave the plan open.
    """
    return rate(arguments) | {"steps": step_count(arguments), "noise_multiplier": arguments.noise_multiplier}


def rate(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling rate, as a keyword argument."""
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


def whole_batch(sample_rate: float, dataset_size: int) -> int:
    """The largest whole number of examples, at least 1, such that batch / dataset_size <= `sample_rate`.

    Raises:
        ParameterError: no data, or fewer than one example a batch.
    """
    if dataset_size < 1:
        raise ParameterError(f"--dataset-size must be at least 1, got {dataset_size}. Count the examples.")
    batch = math.floor(Fraction(sample_rate) * dataset_size)  # exactly: batch / dataset_size must not exceed the rate
    if batch < 1:
        raise ParameterError(
            f"no whole batch fits the budget: rate {rounded_down(sample_rate, 6)} of {dataset_size} examples is less "
            "than one a batch. Add noise, take fewer steps, or ask without --dataset-size."
        )
    return batch


def sampling_phrase(sample_rate: float) -> str:
    """The sampling as reports say it, the rate rounded down: whoever copies it spends no more than the answer says."""
    return f"Poisson, rate {rounded_down(sample_rate, 6)}"


def step_count(arguments: argparse.Namespace) -> int:
    """The number of noisy steps."""
    if (arguments.steps is None) == (arguments.epochs is None):
        raise ParameterError("give either --steps or --epochs (one of the two, not both).")
    if arguments.steps is not None:
        return int(arguments.steps)
    batch, size = arguments.batch_size, arguments.dataset_size
    if batch is None or size is None:
        raise ParameterError("--epochs needs whole numbers to count steps from. Give --batch-size and --dataset-size.")
    return int(arguments.epochs * -(-size // batch))
