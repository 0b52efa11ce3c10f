"""`dpdl split serve`: the label site. It has the last layers and the loss, and waits to be asked."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, final

from dpdl.split.channel import Packet
from dpdl.split.commands.kept_state import load_state, save_state
from dpdl.split.commands.tutorial import (
    BYE,
    CLIENT,
    SERVER,
    add_settings,
    graph_of,
    key_of,
    optimizer_of,
    plan_of,
    signed_of,
)
from dpdl.split.grpc_channel import serve
from dpdl.split.handshake import ManifestGate
from dpdl.split.replay import ReplayGuard
from dpdl.split.server import SplitServer
from dpdl.split.tls import MutualTLS
from dpdl.train_command import EXIT_STOPPED

__all__ = ["register"]

STATE = "server.pt"
REPLIES = "replies.db"
AGREED = "agreed.json"
SCHEMA = "dpdl.split.serve/1"
EXAMPLES = """examples:
  dpdl split serve --certificates certificates                           here, for dpdl split join on this machine
  dpdl split serve --certificates keys --address 0.0.0.0:50061 --output lab   for another machine
"""
STEPS_UNSAVED = 10  # at most so many steps of the weights are lost with the process; their spending is not


def register(subparsers: Any) -> None:
    """Add the command to an argparse parser's subparsers."""
    parser = subparsers.add_parser(
        "serve",
        help="be the label site",
        description="Wait for `dpdl split join`, and train the last layers with it. Ends when the other one is done, "
        "or with Ctrl-C; started again with the same --output it goes on from its last saved weights.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser.add_argument)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("dpdl-split-server"),
        metavar="DIR",
        help="where weights and replies are kept (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print what happened as JSON, a line each")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command; the exit code."""
    plan, graph = plan_of(arguments), graph_of(SERVER)
    folder, output = arguments.certificates, arguments.output
    signed = signed_of(graph, plan, arguments.delta, folder, SERVER)
    keys = key_of(folder, CLIENT)
    output.mkdir(parents=True, exist_ok=True)
    optimizer = optimizer_of(graph, SERVER, arguments.lr)
    site = _Site(SplitServer(graph, SERVER, plan=plan, optimizer=optimizer), output / STATE)
    guard = ReplayGuard(ManifestGate(site, signed, keys=keys, path=output / AGREED), output / REPLIES)
    with _interrupted() as stopped, serve(arguments.address, guard, tls=MutualTLS.of(folder, SERVER)) as server:
        digest = signed.manifest.digest
        _say(
            arguments,
            f"serving at {server.address}, manifest {digest[:12]}",
            event="serving",
            address=server.address,
            manifest=digest,
        )
        while not (stopped.is_set() or site.left.is_set()):
            stopped.wait(0.2)
    guard.close()
    site.save()
    done = site.left.is_set()
    _say(
        arguments,
        f"{site.steps} steps answered; weights in {output / STATE}",
        event="done" if done else "stopped",
        steps=site.steps,
        weights=str(output / STATE),
    )
    if done:
        return 0
    sys.stderr.write("Stopped before the data site was done. Go on with the same command.\n")
    return EXIT_STOPPED


def _say(arguments: argparse.Namespace, text: str, **facts: str | int) -> None:
    """A line for a reader, or for a program."""
    sys.stdout.write((json.dumps({"schema": SCHEMA, **facts}) if arguments.json else text) + "\n")
    sys.stdout.flush()


@final
class _Site:
    """The party, its state on the disk, and whether the other one has said goodbye."""

    def __init__(self, server: SplitServer, path: Path) -> None:
        self.left = threading.Event()
        self.steps = 0
        self._server, self._path = server, path
        if path.exists():
            load_state(server, path)

    def __call__(self, packet: Packet) -> Packet:
        if packet.kind == BYE:
            self.left.set()
            return Packet(kind=BYE)
        reply = self._server.handle(packet)
        if packet.kind == "step":
            self.steps += 1
            if self.steps % STEPS_UNSAVED == 0:
                self.save()
        return reply

    def save(self) -> None:
        """Keep the party's state."""
        save_state(self._server, self._path)


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Set by Ctrl-C and SIGTERM."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
