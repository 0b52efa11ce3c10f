"""`dpdl split certificates`: keys and certificates for all parties."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dpdl.split.certificates import add_client, make_certificates

__all__ = ["register"]

EXAMPLES = """examples:
  dpdl split certificates certificates                          a server on this machine, and one client
  dpdl split certificates keys --host lab.example --client a --client b
  dpdl split certificates keys --add-client c                   one more, later
"""


def register(subparsers: Any) -> None:
    """Add the command to an argparse parser's subparsers."""
    parser = subparsers.add_parser(
        "certificates",
        help="make an authority, certificates and signing keys",
        description="Make an authority of its own for a split network, and certificates and signing keys for its "
        "parties. Give each party authority.pem, its own files, and everybody's .signing.pub; keep authority.key.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="where they go; existing files are not overwritten")
    add("--host", action="append", metavar="HOST", help="name or address of the server, may be given several times "
        "(default: localhost, 127.0.0.1 and ::1)")  # fmt: skip
    add("--client", action="append", metavar="NAME", help="a client, may be given several times (default: client)")
    add("--days", type=int, default=365, help="for how long they are good (default: %(default)s)")
    add("--add-client", metavar="NAME", help="only one more client, by the authority that is in the folder")
    add("--json", action="store_true", help="print what was written as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command; the exit code."""
    if arguments.add_client is not None:
        written = add_client(arguments.folder, arguments.add_client, days=arguments.days)
    else:
        hosts = arguments.host or ("localhost", "127.0.0.1", "::1")
        clients = arguments.client or ("client",)
        written = make_certificates(arguments.folder, hosts=hosts, clients=clients, days=arguments.days)
    secret = {path: path.suffix == ".key" for path in written}  # those have mode 600
    if arguments.json:
        files = [{"path": str(path), "private": private} for path, private in secret.items()]
        sys.stdout.write(json.dumps({"schema": "dpdl.certificates/1", "files": files}, indent=2) + "\n")
        return 0
    for path, private in secret.items():
        sys.stdout.write(f"{path}  ({'private, mode 600' if private else 'public'})\n")
    return 0
