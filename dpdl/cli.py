"""The command `dpdl`: its subcommands, and what they have in common.

Results go to stdout, as a table or with `--json`; progress and remarks go to stderr. Exit codes: 0 done; 1 the question
was answered "no" (an audit contradicts its claim); 2 an error, in one line; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib import metadata

import accountants.cli
from accountants.commands.one_line_parser import OneLineParser
from dpdl import completion_command, train_command
from dpdl.audit import command as audit_command
from dpdl.errors import PrivacyError
from dpdl.federated import command as federated_command
from dpdl.report import command as report_command
from dpdl.split.commands import group as split_commands
from dpdl.tradeoff import command as sweep_command

__all__ = ["main", "parser"]

EXIT_ERROR = 2
EXIT_STOPPED = 130  # as after SIGINT

EXAMPLES = """examples:
  dpdl train                              real digits that come along, epsilon 3 (extra 'demo')
  dpdl train --data mnist/ --epsilon 2    MNIST from its IDX files
  dpdl report dpdl-run                    what that run may claim, and what it means
  dpdl audit dpdl-run                     attack it
  dpdl sweep                              accuracy over epsilon
  dpdl federated --scheme record          ten clients, DP-SGD at each of them
  dpdl calibrate --epsilon 3 --delta 1e-5 --batch-size 256 --dataset-size 60000 --epochs 60
Each command explains itself: dpdl train --help
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a callable from the parsed arguments to the exit code."""
    whole = OneLineParser(
        prog="dpdl",
        description="Differentially private deep learning: train, account, audit, report.",
        epilog=EXAMPLES,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=16),
    )
    whole.add_argument("--version", action="version", version=f"dpdl {metadata.version('dpdl')}")
    subparsers = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (train_command, report_command, audit_command, sweep_command, federated_command, split_commands):
        command.register(subparsers)
    accountants.cli.register(subparsers)
    completion_command.register(subparsers, whole)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code. Errors that the project raises on purpose print as one line."""
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except PrivacyError as error:
        print(f"dpdl: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("dpdl: stopped", file=sys.stderr)
        return EXIT_STOPPED
    return code
