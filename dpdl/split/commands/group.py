"""`dpdl split ...`: the commands of split learning, below one name."""

from __future__ import annotations

import argparse
from typing import Any

from dpdl.split.commands import certificates_command, cost_command, join_command, serve_command

__all__ = ["register"]

EXAMPLES = """examples, on one machine:
  dpdl split certificates certificates          keys for both parties
  dpdl split serve --certificates certificates  the label site, in one terminal
  dpdl split join  --certificates certificates  the data site, in another one
  dpdl split cost  --help                       bytes and work of split, federated and central training
"""


def register(subparsers: Any) -> None:
    """Add the commands to an argparse parser's subparsers."""
    parser = subparsers.add_parser(
        "split",
        help="train one network in two parties",
        description="Split learning: the data site has the first layers, the label site the others.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (certificates_command, serve_command, join_command, cost_command):
        command.register(commands)
