"""The command `dpdl`: its subcommands, and what they have in common.

Results go to stdout, as a table or with `--json`; progress and remarks go to stderr. Exit codes: 0 done; 1 the question
was answered "no" (an audit contradicts its claim); 2 an error, in one line; 130 stopped by Ctrl-C; 141 whoever read
stdout has closed it, as `| head` does.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
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
EXIT_UNREAD = 141  # as after SIGPIPE

EXAMPLES = """examples:
  dpdl train                              real digits that come along, epsilon 3 (extra 'demo')
  dpdl train --data mnist/ --epsilon 2    MNIST from its IDX files
  dpdl report dpdl-run                    what that run may claim, and what it means
  dpdl audit dpdl-run                     attack it
  dpdl sweep                              accuracy over epsilon
  dpdl federated --scheme record          five clients, DP-SGD at each of them
  dpdl calibrate --epsilon 3 --delta 1e-5 --batch-size 256 --dataset-size 60000 --epochs 60
Each command explains itself: dpdl train --help
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a callable from the parsed arguments to the exit code."""
    whole = OneLineParser(
        prog="dpdl",
        description="Differentially private deep learning: train, account, audit, report.",
        epilog=EXAMPLES,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=18),
    )
    whole.add_argument("--version", action="version", version=f"dpdl {metadata.version('dpdl')}")
    subparsers = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (train_command, report_command, audit_command, sweep_command, federated_command, split_commands):
        command.register(subparsers)
    accountants.cli.register(subparsers)
    completion_command.register(subparsers, whole)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code.

    Errors that the project raises on purpose, and those of files, disks and sockets, print as one line. Any other
    exception is a defect, and is not held.
    """
    _open_streams()
    try:
        try:
            arguments = parser().parse_args(argv)
            code: int = arguments.run(arguments)
        finally:
            sys.stdout.flush()  # what cannot be written is found here, and not when the interpreter ends
    except PrivacyError as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        _say("dpdl: stopped")
        return EXIT_STOPPED
    except OSError as error:
        lost = _stdout_is_lost()
        return EXIT_UNREAD if lost and isinstance(error, BrokenPipeError) else _failed(_of_the_system(error, lost))
    return code


def _open_streams() -> None:
    """Output goes nowhere where it was closed, and a name that is no text prints as its bytes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # as after `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 for as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _failed(message: str) -> int:
    _say(f"dpdl: error: {' '.join(message.split())}")
    return EXIT_ERROR


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # stderr is full or closed: the exit code still says it
        print(line, file=sys.stderr, flush=True)


def _of_the_system(error: OSError, stdout_is_lost: bool) -> str:
    """What failed and where, with the remedy."""
    if error.strerror is None:
        return f"{str(error) or type(error).__name__}."
    where = f"{error.filename}: " if error.filename is not None else "standard output: " if stdout_is_lost else ""
    return f"{where}{error.strerror}. Check that the place exists, may be used, and has room."


def _stdout_is_lost() -> bool:
    """Whether nothing can be written there. What still waits is dropped: the interpreter would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return True
    return False
