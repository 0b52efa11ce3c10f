"""A private step over the plain step of the same model: time, interleaved, median, for each engine.

    python -m benchmarks.engines                 # writes benchmarks/results/engines.json
    python -m benchmarks.engines --chunks        # vmap by chunk size, for dpdl/per_sample/vmap.py

A step is forward, loss, backward, clipping, noise and update. Times are process CPU time with one thread, so
that a busy machine changes them less; figures to compare are the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from benchmarks.environment import RESULTS, environment
from dpdl.models import build_model

REPEATS = 7


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a batch for it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Tensor
    classes: int


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((512, 1, 28, 28), generator=generator)
    return [
        Case(
            name="MNIST tanh CNN (256)",
            build=lambda: build_model("papernot-cnn", in_channels=1, image_size=28, classes=10),
            inputs=images[:256],
            classes=10,
        ),
        Case(
            name="MNIST tanh CNN (512)",
            build=lambda: build_model("papernot-cnn", in_channels=1, image_size=28, classes=10),
            inputs=images,
            classes=10,
        ),
        Case(
            name="logistic regression, 784 features (512)",
            build=lambda: build_model("logistic", in_channels=1, image_size=28, classes=10),
            inputs=images,
            classes=10,
        ),
        Case(
            name="CIFAR tanh CNN (64)",
            build=lambda: build_model("cifar-cnn", in_channels=3, image_size=32, classes=10),
            inputs=torch.rand((64, 3, 32, 32), generator=generator),
            classes=10,
        ),
    ]


def plain_step(case: Case) -> Callable[[], None]:
    model = case.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    labels = torch.arange(len(case.inputs)) % case.classes

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(case.inputs), labels).backward()
        optimizer.step()

    return step


def private_step(case: Case, **execution: Any) -> Callable[[], None]:
    """One step through the public interface; sample rate 1, so that every batch is the whole of the data."""
    module = case.build()
    labels = torch.arange(len(case.inputs)) % case.classes
    count = len(labels)
    plan = dpdl.PrivacyPlan(
        sample_rate=1.0, expected_batch_size=count, steps=10_000, noise_multiplier=1.0, max_grad_norm=1.0
    )
    # The data stands in the loader once, and is not collated example by example: loading is not measured.
    loader = DataLoader(_Whole(case.inputs, labels), batch_size=count, collate_fn=lambda indices: indices[0])
    model, optimizer, private = dpdl.make_private(
        module,
        torch.optim.SGD(module.parameters(), lr=0.01),
        loader,
        plan,
        execution=dpdl.Execution(**execution),
    )

    def batches() -> Any:
        while True:
            yield from private

    source = batches()

    def step() -> None:
        inputs, targets = next(source)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    for _ in range(3):  # the first batches carry the checks
        step()
    return step


class _Whole(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return self.tensors


def interleaved(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median seconds of each step, all measured in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", action="store_true", help="compare chunk sizes of vmap")
    parser.add_argument("--out", type=Path, default=RESULTS / "engines.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.chunks:
        variants = {f"vmap, chunks of {n}": {"engine": "vmap", "chunk_size": n} for n in (16, 32, 64, 128, 256, 512)}
    else:
        variants = {name: {"engine": name} for name in ("vmap", "loop")}

    table = Table("model (batch)", "plain ms", *variants, title="private step over the plain step")
    rows = []
    for case in cases():
        steps = {"plain": plain_step(case), **{n: private_step(case, **e) for n, e in variants.items()}}
        medians = interleaved(steps)
        ratios = {name: medians[name] / medians["plain"] for name in variants}
        rows.append({"model": case.name, "plain_ms": 1e3 * medians["plain"], "ratios": ratios})
        table.add_row(case.name, f"{1e3 * medians['plain']:.1f}", *(f"{r:.2f}" for r in ratios.values()))
    Console().print(table)
    if not arguments.chunks:
        arguments.out.parent.mkdir(exist_ok=True)
        arguments.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
