"""`dpdl completion`: what a shell needs to complete commands, options and their values."""

from __future__ import annotations

import argparse
from typing import Any

from dpdl.errors import DataError

__all__ = ["register"]

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
    print(shtab.complete(whole, shell=shell))
    return 0
