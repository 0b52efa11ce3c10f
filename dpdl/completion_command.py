"""`dpdl completion`: what a shell needs to complete commands, options and their values."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dpdl.errors import DataError

__all__ = ["register"]

FOLDER = "DIR"  # the placeholder of options that take one
SHELLS = ("bash", "zsh", "tcsh")

EXAMPLES = """examples:
  dpdl completion bash > ~/.local/share/bash-completion/completions/dpdl
  dpdl completion zsh > ~/.zfunc/_dpdl          with fpath+=~/.zfunc before compinit in ~/.zshrc
  eval "$(dpdl completion bash)"                for this session
"""


def register(subparsers: Any, whole: argparse.ArgumentParser) -> None:
    """Add the command to an argparse parser's subparsers.

    Args:
        subparsers: what `ArgumentParser.add_subparsers` returned.
        whole: the parser whose commands are completed.
    """
    parser = subparsers.add_parser(
        "completion",
        help="print a script that completes commands in a shell",
        description="Print a script that lets a shell complete commands and options.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell it is for")
    parser.set_defaults(run=lambda arguments: run(arguments.shell, whole))


def run(shell: str, whole: argparse.ArgumentParser) -> int:
    """Print the script; the exit code.

    Raises:
        DataError: shtab, which writes it, is not installed.
    """
    try:
        import shtab  # optional: the extra "completion"
    except ImportError as error:
        raise DataError("Completion needs shtab: pip install 'dpdl[completion]'.") from error
    _complete_paths(whole, files=shtab.FILE, folders=shtab.DIRECTORY)
    sys.stdout.write(shtab.complete(whole, shell=shell) + "\n")
    return 0


def _complete_paths(parser: argparse.ArgumentParser, *, files: object, folders: object) -> None:
    """Say to shtab, by the attribute that it looks for, which arguments are paths."""
    for action in parser._actions:  # argparse has no public list of them; shtab reads the same one
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _complete_paths(below, files=files, folders=folders)
        elif action.type is Path or action.metavar == "PATH":
            vars(action)["complete"] = folders if action.metavar == FOLDER else files
