"""The command `dpdl`: train on images, alone or in a federation, and ask what privacy costs.

dpdl train                              the embedded digits, epsilon 3
dpdl train --data mnist/ --epsilon 2    MNIST from its IDX files
dpdl federated --scheme record          ten clients, DP-SGD at each of them
dpdl epsilon --noise-multiplier 1.1 --batch-size 256 --dataset-size 60000 --epochs 60 --delta 1e-5
dpdl calibrate --epsilon 3 --delta 1e-5 --batch-size 256 --dataset-size 60000 --epochs 60
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata

import accountants.cli
from accountants.commands.one_line_parser import OneLineParser
from dpdl import train_command
from dpdl.errors import PrivacyError
from dpdl.federated import command as federated_command
from dpdl.split.commands import group as split_commands

__all__ = ["main"]

EXIT_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code. Errors that the project raises on purpose print as one line."""
    parser = OneLineParser(
        prog="dpdl",
        description="Differentially private deep learning.",
        epilog="Each command explains itself: dpdl train --help",
    )
    parser.add_argument("--version", action="version", version=f"dpdl {metadata.version('dpdl')}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train_command.register(subparsers)
    federated_command.register(subparsers)
    split_commands.register(subparsers)
    accountants.cli.register(subparsers)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except PrivacyError as error:
        print(f"dpdl: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    return code
