"""A small run that is killed at random moments and resumed each time, with a record of every word it drew.

    python -m tests.end_to_end.killed_run FOLDER SEED KILLS STEPS RESERVE

One process imports everything and forks the ones that train: it never goes backward itself, which torch's autograd
would not forgive its children. SEED is "secure", or a number; then an unkilled run is made as well, for comparison.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # torch would import it in the first step, and every child again
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from dpdl.budget import Budget
from dpdl.ledger_file import LedgerFile
from dpdl.secure_random import RandomStream

N, SIDE, CLASSES = 96, 8, 4
EVERY = 4  # steps between checkpoints
PATIENCE = 120.0  # seconds without any progress


def images() -> TensorDataset:
    """Classes as bright corners in noise."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, CLASSES, (N,), generator=generator)
    pixels = torch.rand(N, 1, SIDE, SIDE, generator=generator)
    half = SIDE // 2
    for pixel, label in zip(pixels, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        pixel[:, row * half : (row + 1) * half, column * half : (column + 1) * half] += 1
    return TensorDataset(pixels, labels)


def network() -> nn.Sequential:
    torch.manual_seed(6)
    return nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(27, CLASSES))


def record_draws(log: Path) -> None:
    """Have every word that a stream gives written down, as a digest, before it is used."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    draw = RandomStream.words

    def recorded(self: RandomStream, count: int, *, message: int, start: int = 0) -> NDArray[np.uint64]:
        words = draw(self, count, message=message, start=start)
        if not count:
            return words
        digest = hashlib.sha256(words.tobytes()).hexdigest()
        line = json.dumps([self._labels[0], message, start, count, digest])
        os.write(file, b"\n" + line.encode() + b"\n")  # on a line of its own also if the one before was torn by a kill
        return words

    RandomStream.words = recorded  # type: ignore[method-assign]


def train(folder: Path, *, seed: int | None, steps: int, reserve: int) -> None:
    """The loop as a user writes it: go on from the checkpoint if there is one."""
    torch.set_num_threads(1)
    record_draws(folder / "draws")
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    loader = DataLoader(images(), batch_size=16, shuffle=True)
    plan = dpdl.PrivacyPlan.for_loader(loader, steps=steps, noise_multiplier=1.0, max_grad_norm=1.0)
    ledger = LedgerFile(folder / "data.ledger", budget=Budget(epsilon=50.0, delta=1e-5), reserve=reserve)
    execution = dpdl.Execution(engine="vmap", insecure_seed=seed, self_check=False)
    private = dpdl.make_private(model, optimizer, loader, plan, execution=execution, ledger=ledger)
    scheduler = torch.optim.lr_scheduler.StepLR(private.optimizer, 10, gamma=0.9)

    def save() -> None:
        dpdl.save_checkpoint(folder / "run.pt", private.model, private.optimizer, scheduler=scheduler)

    if (folder / "run.pt").exists():
        dpdl.load_checkpoint(folder / "run.pt", private.model, private.optimizer, scheduler=scheduler)
    else:
        save()
    while private.optimizer.steps_taken < steps:
        for x, y in private.loader:
            private.optimizer.zero_grad()
            F.cross_entropy(private.model(x), y).backward()
            private.optimizer.step()
            scheduler.step()
            if private.optimizer.steps_taken % EVERY == 0:
                save()
    ledger.give_back()
    save()
    (folder / "report.json").write_text(private.optimizer.report(1e-5).to_json())


def forked(folder: Path, **settings: Any) -> int:
    """The process id of a run that goes on in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            train(folder, **settings)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int) -> bool:
    """Whether a child has ended by itself; it must have ended well."""
    pid, status = os.waitpid(child, os.WNOHANG)
    assert pid == 0 or status == 0, f"the run failed with status {status}"
    return pid != 0


def kill_at_a_random_moment(child: int, folder: Path, luck: random.Random, furthest: int) -> bool:
    """Wait for a random number of further draws, and a little, and kill; False if the run was over before."""
    wanted = draws_in(folder) + luck.randrange(furthest)
    late = time.monotonic() + PATIENCE
    while draws_in(folder) < wanted:
        if ended(child):
            return False
        assert time.monotonic() < late, "the run makes no progress"
        time.sleep(0.001)
    time.sleep(luck.random() * 0.03)
    if ended(child):
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def draws_in(folder: Path) -> int:
    log = folder / "draws"
    return log.read_bytes().count(b"]\n") if log.exists() else 0


def train_to_the_end(folder: Path, **settings: Any) -> None:
    """One run, not killed."""
    _, status = os.waitpid(forked(folder, **settings), 0)
    assert status == 0, "the run failed"


def main() -> None:
    """Run to the end, killed as often as asked for; print how often it was."""
    folder, seed, kills, steps, reserve = Path(sys.argv[1]), sys.argv[2], *(int(text) for text in sys.argv[3:])
    settings = {"seed": None if seed == "secure" else int(seed), "steps": steps, "reserve": reserve}
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    if seed != "secure":
        train_to_the_end(folder / "whole", **settings)
    luck = random.Random(f"{seed} {kills} {steps} {reserve}")
    killed = 0
    while killed < kills:
        child = forked(folder / "killed", **settings)
        if not kill_at_a_random_moment(child, folder / "killed", luck, furthest=2 * max(2, steps // (kills + 1))):
            break
        killed += 1
    else:
        train_to_the_end(folder / "killed", **settings)
    print(killed)


if __name__ == "__main__":
    main()
