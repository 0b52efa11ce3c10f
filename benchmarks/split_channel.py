"""What a channel adds to a step of split learning: milliseconds beyond the same call within the process.

    python -m benchmarks.split_channel                    # prints a table
    python -m benchmarks.split_channel --out channel.json # and writes it, with versions and hardware

64 rows of 1,568 float32 go over and as many come back, 401 kB each way; the handler returns what it was sent. The
server is a process of its own, on the loopback. The channels take turns, step by step, so that a busy machine slows
them alike; each figure is the median of wall time, with the quarter below and above. Wall time, so run it on a quiet
machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from dpdl.split.certificates import make_certificates
from dpdl.split.channel import Channel, Packet
from dpdl.split.direct_channel import DirectChannel
from dpdl.split.grpc_channel import GrpcChannel, serve
from dpdl.split.local_channel import LocalChannel
from dpdl.split.replay import ReplayGuard
from dpdl.split.retrying import RetryingChannel
from dpdl.split.tls import MutualTLS

ROWS, WIDTH = 64, 1568  # 401 kB of float32
STEPS = 200
WARM_UP = 10
WITHIN = "in process, no frames"
TIMEOUT = 60.0


def echo(packet: Packet) -> Packet:
    """The cheapest handler: what is left is the channel."""
    return Packet(kind=packet.kind, tensors=packet.tensors)


def serve_until_told(folder: str, path: str | None, told: Connection) -> None:
    """A server in a process of its own."""
    torch.set_num_threads(1)
    with serve("localhost:0", ReplayGuard(echo, path), tls=MutualTLS.of(folder, "server")) as server:
        told.send(server.address)
        told.recv()


@contextmanager
def elsewhere(folder: Path, path: Path | None) -> Iterator[GrpcChannel]:
    """A channel to a server in another process, over TLS."""
    here, there = multiprocessing.Pipe()
    processes = multiprocessing.get_context("spawn")
    process = processes.Process(target=serve_until_told, args=(str(folder), None if path is None else str(path), there))
    process.start()
    try:
        channel = GrpcChannel.connect(here.recv(), tls=MutualTLS.of(folder, "client"))
        yield channel
        channel.close()
        here.send("enough")
        process.join(30.0)
    finally:
        process.kill()
        process.join()


def measure(steps: int = STEPS, rows: int = ROWS, width: int = WIDTH) -> dict[str, dict[str, float]]:
    """Median milliseconds of a request by channel, their quartiles, and what is beyond the one without frames."""
    z = {"cut": torch.randn(rows, width)}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        make_certificates(folder / "certificates")
        keys = folder / "certificates"
        channels: dict[str, Channel] = {
            WITHIN: DirectChannel(echo),
            "in process, frames": LocalChannel(echo),
            "in process, frames, guard": LocalChannel(ReplayGuard(echo)),
            "gRPC, TLS, guard in memory": stack.enter_context(elsewhere(keys, None)),
            "gRPC, TLS, guard on disk": stack.enter_context(elsewhere(keys, folder / "replies.db")),
            "gRPC, TLS, guard and outbox on disk": RetryingChannel(
                stack.enter_context(elsewhere(keys, folder / "more.db")), outbox=folder / "outbox"
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in channels}
        for step in range(WARM_UP + steps):
            for name, channel in channels.items():
                begun = time.perf_counter()
                channel.request("step", {"session": "benchmark", "step": step}, z, timeout=TIMEOUT)
                seconds[name].append(time.perf_counter() - begun)
    return _figures({name: times[WARM_UP:] for name, times in seconds.items()})


def _figures(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    figures = {}
    base = statistics.median(seconds[WITHIN])
    for name, times in seconds.items():
        low, median, high = (1e3 * quartile for quartile in statistics.quantiles(times, n=4))
        figures[name] = {"median": median, "lower": low, "upper": high, "beyond": median - 1e3 * base}
    return figures


def main() -> None:
    """Measure, print, and write only where --out says."""
    parser = argparse.ArgumentParser(description="Cost of a channel, milliseconds a step.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"measured steps (default {STEPS})")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(options.steps)
    kilobytes = 4 * ROWS * WIDTH / 1000
    print(f"{kilobytes:.0f} kB each way, ms a step: median of {options.steps} (quartiles), and beyond '{WITHIN}'")
    for name, row in figures.items():
        print(f"  {name:<38}{row['median']:7.2f} ({row['lower']:.2f} to {row['upper']:.2f}) {row['beyond']:8.2f}")
    if options.out is not None:
        packages = ("dpdl", "torch", "grpcio", "cryptography")
        record: dict[str, Any] = {"kilobytes": kilobytes, "steps": options.steps, "milliseconds": figures}
        options.out.write_text(json.dumps({**environment(packages), **record}, indent=2) + "\n")


if __name__ == "__main__":
    main()
