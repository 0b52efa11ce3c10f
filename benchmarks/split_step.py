"""A private step of a split network beside the private, and the plain, step of the same network whole.

    python -m benchmarks.split_step                          # prints a table
    python -m benchmarks.split_step --out step.json          # and writes it, with versions and hardware

An MNIST network is cut behind its first convolution: rows of 1,568 float32, so that 64 of them are 401 kB each way.
Five ways take turns, step by step, so that a busy machine slows them alike: the network whole without privacy, whole
with DP-SGD, in two parts in one process, in two parts in one process through frames, and in two processes over gRPC
with mutual TLS. Batches are Poisson-sampled with 64 expected rows in all but the plain way, which has 64. Each figure
is the median of wall time, with the quarter below and above. Run it on a quiet machine with two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from benchmarks.environment import environment
from dpdl.split.certificates import make_certificates
from dpdl.split.client import SplitClient
from dpdl.split.grpc_channel import GrpcChannel, serve
from dpdl.split.local_channel import LocalChannel
from dpdl.split.replay import ReplayGuard
from dpdl.split.server import SplitServer
from dpdl.split.session import SplitRun
from dpdl.split.tls import MutualTLS
from dpdl.split.topologies import vanilla

ROWS, RECORDS = 64, 6400
STEPS, WARM_UP = 100, 15
RATE = 0.1
PLAIN, WHOLE, PARTS, FRAMES, TLS = (
    "whole, not private",
    "whole, private",
    "two parts, in process",
    "two parts, in process, frames",
    "two parts, two processes, gRPC with TLS",
)


def bottom() -> nn.Module:
    """The data site's part: images [N, 1, 28, 28] to rows [N, 8, 14, 14]."""
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2))


def top() -> nn.Module:
    """The label site's part."""
    return nn.Sequential(nn.Conv2d(8, 16, 5, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(16 * 25, 10))


def sum_of_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=RATE)


def plan_of(steps: int) -> dpdl.PrivacyPlan:
    return dpdl.PrivacyPlan(
        sample_rate=ROWS / RECORDS,
        expected_batch_size=ROWS,
        steps=steps,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        dataset_size=RECORDS,
    )


def serve_until_told(folder: str, steps: int, told: Connection) -> None:
    """The label site in a process of its own."""
    torch.set_num_threads(1)
    upper = top()
    graph = vanilla(None, upper, sum_of_losses)
    site = SplitServer(graph, "server", plan=plan_of(steps), optimizer=sgd(upper))
    with serve("localhost:0", ReplayGuard(site.handle), tls=MutualTLS.of(folder, "server")) as server:
        told.send(server.address)
        told.recv()


@contextmanager
def elsewhere(folder: Path, data: dict[str, Tensor], steps: int) -> Iterator[SplitClient]:
    """The data site here, the label site in another process."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve_until_told, args=(str(folder), steps, there))
    process.start()
    try:
        channel = GrpcChannel.connect(here.recv(), tls=MutualTLS.of(folder, "client"))
        lower = bottom()
        graph = vanilla(lower, None, None)
        yield SplitClient(
            graph, "client", plan=plan_of(steps), optimizer=sgd(lower), data=data, channels={"server": channel}
        )
        channel.close()
        here.send("enough")
        process.join(30.0)
    finally:
        process.kill()
        process.join()


def in_one_process(data: dict[str, Tensor], steps: int, **more: Any) -> SplitRun:
    lower, upper = bottom(), top()
    graph = vanilla(lower, upper, sum_of_losses)
    return SplitRun(graph, {"client": sgd(lower), "server": sgd(upper)}, data, plan_of(steps), **more)


def step_of_whole(loader: Any, model: Any, optimizer: Any) -> Callable[[], None]:
    """A step of an ordinary loop, private or plain."""

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    endless = batches()

    def step() -> None:
        x, y = next(endless)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def measure(steps: int = STEPS) -> dict[str, dict[str, float]]:
    """Median milliseconds of a step by way, their quartiles, and the ratio to the private step of the whole."""
    torch.manual_seed(0)
    x, y = torch.rand(RECORDS, 1, 28, 28), torch.randint(10, (RECORDS,))
    data, planned = {"x": x, "y": y}, steps + WARM_UP
    loader = DataLoader(TensorDataset(x, y), batch_size=ROWS, shuffle=True)
    plain = nn.Sequential(bottom(), top())
    whole = nn.Sequential(bottom(), top())
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        keys = Path(name) / "certificates"
        make_certificates(keys)
        ways: dict[str, Callable[[], None]] = {
            PLAIN: step_of_whole(loader, plain, sgd(plain)),
            WHOLE: _private(whole, loader, planned),
            PARTS: in_one_process(data, planned).step,
            FRAMES: in_one_process(data, planned, connect=LocalChannel).step,
            TLS: stack.enter_context(elsewhere(keys, data, planned)).step,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(planned):
            for way, step in ways.items():
                begun = time.perf_counter()
                step()
                seconds[way].append(time.perf_counter() - begun)
    return _figures({way: times[WARM_UP:] for way, times in seconds.items()})


def _private(whole: nn.Module, loader: DataLoader[Any], steps: int) -> Callable[[], None]:
    model, optimizer, batches = dpdl.make_private(whole, sgd(whole), loader, plan_of(steps))
    return step_of_whole(batches, model, optimizer)


def _figures(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    figures = {}
    base = statistics.median(seconds[WHOLE])
    for way, times in seconds.items():
        low, median, high = (1e3 * quartile for quartile in statistics.quantiles(times, n=4))
        figures[way] = {"median": median, "lower": low, "upper": high, "over whole, private": median / (1e3 * base)}
    return figures


def main() -> None:
    """Measure, print, and write only where --out says."""
    parser = argparse.ArgumentParser(description="A private step of a split network, milliseconds.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"measured steps (default {STEPS})")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(options.steps)
    print(f"{ROWS} rows a step, 401 kB each way, ms a step: median of {options.steps} (quartiles), over '{WHOLE}'")
    for way, row in figures.items():
        print(
            f"  {way:<42}{row['median']:7.2f} ({row['lower']:.2f} to {row['upper']:.2f}) "
            f"{row['over whole, private']:6.2f}"
        )
    if options.out is not None:
        packages = ("dpdl", "torch", "grpcio", "cryptography")
        record: dict[str, Any] = {"rows": ROWS, "steps": options.steps, "milliseconds": figures}
        options.out.write_text(json.dumps({**environment(packages), **record}, indent=2) + "\n")


if __name__ == "__main__":
    main()
