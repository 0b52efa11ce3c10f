"""`dpdl sweep` in this process, or as a program of its own that a test interrupts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from accountants.commands.one_line_parser import OneLineParser
from dpdl.errors import PrivacyError
from dpdl.tradeoff import command


def dpdl(*argv: str) -> int:
    """The command's exit code; its errors print as one line."""
    parser = OneLineParser(prog="dpdl")
    command.register(parser.add_subparsers(required=True))
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except PrivacyError as error:
        print(f"dpdl: error: {error}", file=sys.stderr)
        return 2


def main(argv: Sequence[str]) -> int:
    return dpdl(*argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
