"""Processes are killed at random moments while they release rows and labels: none ever leaves with a second draw.

Whatever left is in an outbox, which a child writes right after `release` returned. The same row must have left as the
same bytes each time, whoever sent it, and the ledger must have exactly one release of the store.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch
from torch import nn

from accountants import NeighboringRelation
from dpdl.ledger_file import LedgerFile
from dpdl.secure_random import RandomStream
from dpdl.split.cut_release import CutRelease
from dpdl.split.labels import LabelStore, MemoizedRandomizedResponse
from dpdl.split.part_training import PartTraining
from dpdl.split.releaser import CachedRelease
from dpdl.split.row_account import RowAccount
from dpdl.split.row_cache import RowCache

REPLACE_ONE = NeighboringRelation.REPLACE_ONE
ROWS = 4000
X = torch.arange(ROWS * 2, dtype=torch.float32).reshape(ROWS, 2)
Sender = Callable[[Path, bool], Callable[[list[int]], list[bytes]]]


def rows(folder: Path, kept: bool) -> Callable[[list[int]], list[bytes]]:
    ledger = LedgerFile(folder / "ledger", relation=REPLACE_ONE)
    account = RowAccount(ledger=ledger, run="server", training=PartTraining.frozen())
    cut = CachedRelease(
        CutRelease(max_norm=1.0, noise_multiplier=1.0, mode="release_once"),
        cache=RowCache(folder / "store" if kept else None),
        encoder=nn.Identity(),
        account=account,
        stream=RandomStream.from_os(),
    )
    return lambda ids: [row.numpy().tobytes() for row in cut.release(X[ids], ids)]


def labels(folder: Path, kept: bool) -> Callable[[list[int]], list[bytes]]:
    plan = MemoizedRandomizedResponse(epsilon=0.5, classes=100, path=folder / "store" if kept else None)
    ledger = LedgerFile(folder / "ledger", relation=REPLACE_ONE)
    store = LabelStore(plan, stream=RandomStream.from_os(), ledger=ledger)
    return lambda ids: [bytes([int(answer)]) for answer in store.release(ids, torch.zeros(len(ids), dtype=torch.int64))]


def child(sender: Sender, folder: Path, kept: bool, seed: int) -> None:
    send = sender(folder, kept)
    chance = random.Random(seed)
    outbox = os.open(folder / "outbox", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        ids = chance.sample(range(ROWS), 8)
        for name, value in zip(ids, send(ids), strict=True):
            os.write(outbox, f"{name} {value.hex()}\n".encode())


def left(folder: Path) -> dict[str, set[str]]:
    """Row to all that has left of it."""
    found: dict[str, set[str]] = {}
    for line in (folder / "outbox").read_text().splitlines():
        name, _, value = line.partition(" ")
        found.setdefault(name, set()).add(value)
    return found


def killed_at_random(sender: Sender, folder: Path, *, kept: bool, kills: int, seconds: float) -> None:
    context = multiprocessing.get_context("fork")
    chance = random.Random(7)
    running: list[ForkProcess] = []
    try:
        for seed in range(kills):
            while len(running) < 2:
                process = context.Process(target=child, args=(sender, folder, kept, seed * 2 + len(running)))
                process.start()
                running.append(process)
            time.sleep(chance.uniform(0, seconds))
            process = running.pop(chance.randrange(2))
            assert process.is_alive(), "it ended by itself: an error in its output above"
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGKILL)
            process.join()


@pytest.mark.parametrize("sender", [rows, labels])
def test_no_row_leaves_with_a_second_draw_whenever_processes_are_killed(tmp_path: Path, sender: Sender) -> None:
    # The first child makes the store before any is killed; then kills fall where they fall.
    sender(tmp_path, True)([0])
    killed_at_random(sender, tmp_path, kept=True, kills=25, seconds=0.1)
    seen = left(tmp_path)
    assert len(seen) > 20, "hardly anything was sent: the test shows nothing"
    assert all(len(values) == 1 for values in seen.values())
    again = sender(tmp_path, True)([int(name) for name in seen])
    assert [{value.hex()} for value in again] == list(seen.values())
    assert LedgerFile(tmp_path / "ledger", relation=REPLACE_ONE).releases == 1


@pytest.mark.slow
@pytest.mark.parametrize("sender", [rows, labels])
def test_no_row_leaves_with_a_second_draw_in_three_hundred_kills(tmp_path: Path, sender: Sender) -> None:
    killed_at_random(sender, tmp_path, kept=True, kills=300, seconds=0.25)
    seen = left(tmp_path)
    assert len(seen) > 1000
    assert all(len(values) == 1 for values in seen.values())
    assert LedgerFile(tmp_path / "ledger", relation=REPLACE_ONE).releases == 1


@pytest.mark.parametrize("sender", [rows, labels])
def test_a_store_that_a_killed_process_takes_along_would_be_found_out(tmp_path: Path, sender: Sender) -> None:
    killed_at_random(sender, tmp_path, kept=False, kills=6, seconds=0.3)
    assert any(len(values) > 1 for values in left(tmp_path).values())
    assert LedgerFile(tmp_path / "ledger", relation=REPLACE_ONE).releases > 1  # and each is counted


@pytest.mark.parametrize("sender", [rows, labels])
def test_processes_that_begin_at_once_make_one_store(tmp_path: Path, sender: Sender) -> None:
    context = multiprocessing.get_context("fork")
    everybody: list[ForkProcess] = []
    for seed in range(4):
        process = context.Process(target=_once, args=(sender, tmp_path, seed))
        process.start()
        everybody.append(process)
    for process in everybody:
        process.join()
        assert process.exitcode == 0
    assert len(left(tmp_path)) == 300
    assert all(len(values) == 1 for values in left(tmp_path).values())


def _once(sender: Sender, folder: Path, seed: int) -> None:
    send = sender(folder, True)
    outbox = os.open(folder / "outbox", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    order = random.Random(seed).sample(range(300), 300)
    for begin in range(0, 300, 60):
        ids = order[begin : begin + 60]
        for name, value in zip(ids, send(ids), strict=True):
            os.write(outbox, f"{name} {value.hex()}\n".encode())
