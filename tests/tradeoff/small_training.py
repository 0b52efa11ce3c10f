"""Trainings of milliseconds, for sweeps in tests; at top level, so that other processes find them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpdl.tradeoff import Outcome, Point, SweepResult, sweep

RECORDS, COLUMNS = 40, 3
SMALL: dict[str, Any] = {
    "delta": 1e-3,
    "epsilons": (1.0, 4.0),
    "dataset_size": RECORDS,
    "epochs": 3,
    "max_grad_norms": (1.0,),
    "batch_sizes": (RECORDS,),  # all in each batch: accounted in closed form, in no time
    "lrs": (0.1,),
    "seeds": (0, 1),
}


def fitted(point: Point) -> tuple[nn.Module, Any]:
    """A linear model trained as the point says, and its optimizer."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(RECORDS, COLUMNS, generator=generator)
    data = DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=point.batch_size)
    plain = nn.Linear(COLUMNS, 2)
    sgd = torch.optim.SGD(plain.parameters(), lr=point.lr or 0.1)
    model, optimizer, loader = point.make_private(plain, sgd, data)
    while optimizer.steps_taken < point.plan.steps:
        for rows, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(rows), labels).backward()
            optimizer.step()
    return plain, optimizer


def train(point: Point) -> Outcome:
    """Its score is the sum of its weights: what any difference would show in."""
    plain, optimizer = fitted(point)
    total = float(sum(p.detach().double().sum() for p in plain.parameters()))
    if point.folder is not None:
        (point.folder / "weights.txt").write_text(repr(total))
    return Outcome(score=total, report=optimizer.report(point.delta), metrics={"seed": float(point.seed)})


def train_noted(point: Point) -> Outcome:
    """Notes each call in a file, and takes its time."""
    with Path(point.settings["notes"]).open("a") as file:
        file.write(f"{point.key} {os.getpid()}\n")
    time.sleep(point.settings["sleep"])
    return train(point)


def train_or_fail(point: Point) -> Outcome:
    """Fails at seed 1."""
    if point.seed == 1:
        raise RuntimeError("no such luck")
    return train(point)


def train_or_die(point: Point) -> Outcome:
    """Its process dies at seed 1."""
    if point.seed == 1:
        os._exit(3)
    return train(point)


def train_another(point: Point) -> Outcome:
    """Returns the report of another plan."""
    _, optimizer = fitted(point)
    return Outcome(score=1.0, report=optimizer.report(point.delta / 2))


def report_of_nothing(point: Point) -> Any:
    """Returns no outcome."""
    return 0.5


def small(train: Any = train, **changed: Any) -> SweepResult:
    """A sweep of two epsilons, two seeds and the non-private line."""
    return sweep(train, **{**SMALL, **changed})


if __name__ == "__main__":  # the sweep that a test kills
    import sys

    folder, jobs = Path(sys.argv[1]), int(sys.argv[2])
    from tests.tradeoff import small_training  # under the name that other processes know

    small(
        small_training.train_noted,
        settings={"notes": str(folder / "notes"), "sleep": 0.4},
        output=folder / "out",
        jobs=jobs,
        threads=1,
        insecure_seed=5,
    )
