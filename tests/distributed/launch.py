"""Runs a function in several processes that can talk to each other over gloo, and collects what it returns."""

from __future__ import annotations

import pickle
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

TIMEOUT = timedelta(seconds=60)


def launch(work: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """What `work(rank, *args)` returned or raised on each rank; None for one that was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run, args=(work, rank, ranks, port, folder, args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        assert process.exitcode is not None, "a rank hangs"
    answers = [folder / f"rank{rank}" for rank in range(ranks)]
    return [pickle.loads(answer.read_bytes()) if answer.exists() else None for answer in answers]


def _run(work: Callable[..., Any], rank: int, ranks: int, port: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    try:
        answer: Any = work(rank, *args)
    except Exception as error:  # whatever it is, the test looks at it
        answer = (type(error).__name__, str(error), traceback.format_exc())
    (folder / f"rank{rank}").write_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
