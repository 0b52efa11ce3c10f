"""`dpdl split serve`: the label site. It has the last layers and the loss, and waits to be asked."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, final

import torch

from dpdl.errors import CheckpointError
from dpdl.split.channel import Packet
from dpdl.split.commands.tutorial import (
    BYE,
    CLIENT,
    SERVER,
    add_settings,
    graph_of,
    key_of,
    manifest_of,
    optimizer_of,
    plan_of,
    signed_of,
)
from dpdl.split.grpc_channel import serve
from dpdl.split.handshake import ManifestGate
from dpdl.split.replay import ReplayGuard
from dpdl.split.server import SplitServer
from dpdl.split.tls import MutualTLS

__all__ = ["register"]

STATE = "server.pt"
REPLIES = "replies.db"
AGREED = "agreed.json"
STEPS_UNSAVED = 10  # at most so many steps of the weights are lost with the process; their spending is not


def register(subparsers: Any) -> None:
    """Add the command to an argparse parser's subparsers."""
    parser = subparsers.add_parser(
        "serve",
        help="be the label site",
        description="Wait for `dpdl split join`, and train the last layers with it. Ends when the other one is done, "
        "or with Ctrl-C; started again with the same --output it goes on from its last saved weights.",
    )
    add_settings(parser.add_argument)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("dpdl-split-server"),
        metavar="DIR",
        help="where weights and replies are kept (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command; the exit code."""
    plan, graph = plan_of(arguments), graph_of(SERVER)
    folder, output = arguments.certificates, arguments.output
    signed = signed_of(manifest_of(graph, plan, arguments.delta), folder, SERVER)
    keys = key_of(folder, CLIENT)
    output.mkdir(parents=True, exist_ok=True)
    optimizer = optimizer_of(graph, SERVER, arguments.lr)
    site = _Site(SplitServer(graph, SERVER, plan=plan, optimizer=optimizer), output / STATE)
    guard = ReplayGuard(ManifestGate(site, signed, keys=keys, path=output / AGREED), output / REPLIES)
    with _interrupted() as stopped, serve(arguments.address, guard, tls=MutualTLS.of(folder, SERVER)) as server:
        sys.stdout.write(f"serving at {server.address}, manifest {signed.manifest.digest[:12]}\n")
        sys.stdout.flush()
        while not (stopped.is_set() or site.left.is_set()):
            stopped.wait(0.2)
    guard.close()
    site.save()
    sys.stdout.write(f"{site.steps} steps answered; weights in {output / STATE}\n")
    return 0


@final
class _Site:
    """The party, its state on the disk, and whether the other one has said goodbye."""

    def __init__(self, server: SplitServer, path: Path) -> None:
        self.left = threading.Event()
        self.steps = 0
        self._server, self._path = server, path
        if path.exists():
            self._load()

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
        """Put the state in the place of the last one, whole or not at all."""
        beside = self._path.with_name(f".{self._path.name}")
        with beside.open("wb") as file:
            torch.save(self._server.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._path)

    def _load(self) -> None:
        try:
            self._server.load_state_dict(torch.load(self._path, weights_only=True))
        except (OSError, RuntimeError, LookupError, ValueError, EOFError) as error:
            raise CheckpointError(
                f"{self._path} is not the state of this network ({type(error).__name__}). Choose another --output."
            ) from error


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
