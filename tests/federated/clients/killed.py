"""A client's process, which a test kills: it answers one round after another, and writes down what it has answered.

    reply ─▶ on the disk of the "server": round, digest of the update ─▶ next round

Each process begins at round 1, as if the server had seen nothing: what was answered has to come again, to the bit.
"""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

import dpdl
from dpdl.federated.messages import FitReply
from dpdl.federated.reply_store import ReplyStore
from tests.federated.clients.worlds import client, records, request, weights

ROUNDS, STEPS = 6, 4


class Slow(Dataset[Any]):
    """Records; the process dies at a certain read, if one is given."""

    def __init__(self, dies_at: int | None) -> None:
        self._inputs, self._targets = records()
        self._left = dies_at

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                die()
        return self._inputs[index], self._targets[index]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def digest(update: Any) -> str:
    return hashlib.sha256(b"".join(update[name].numpy().tobytes() for name in sorted(update))).hexdigest()


def take_part(folder: str, seed: int | None, dies: str = "", dies_at: int | None = None) -> None:
    """Answer all rounds, starting from the first.

    Args:
        folder: with ledger and replies, and the server's notes.
        seed: the client's insecure_seed.
        dies: "reading", "stepping", "storing", "stored": where the process kills itself, at the `dies_at`-th time.
    """
    torch.set_num_threads(1)
    here = Path(folder)
    left = dies_at or 0

    def train(model: Any, optimizer: Any, loader: Any, steps: int) -> None:
        nonlocal left
        taken = 0
        while taken < steps:
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                taken += 1
                if dies == "stepping":
                    left -= 1
                    if left == 0:
                        die()
                if taken == steps:
                    break

    class Dying(ReplyStore):
        def put(self, *args: Any) -> None:
            nonlocal left
            left -= dies in ("storing", "stored")
            if dies == "storing" and left == 0:
                die()
            super().put(*args)
            if dies == "stored" and left == 0:
                die()

    ward = client(
        dpdl.LedgerFile(here / "ward.ledger", budget=dpdl.Budget(epsilon=1000.0, delta=1e-5)),
        dataset=Slow(dies_at if dies == "reading" else None),
        train=train,
        steps=STEPS,
        insecure_seed=seed,
        replies=Dying(here / "replies", keep=ROUNDS),
        max_failures=1000,
    )
    state = weights()
    for round in range(1, ROUNDS + 1):
        reply = ward.answer(request(round, state))
        assert isinstance(reply, FitReply), reply
        with (here / "server").open("a") as notes:
            notes.write(f"{round} {digest(reply.update)}\n")
            notes.flush()
            os.fsync(notes.fileno())
        state = reply.state
    (here / "done").touch()


def answer_one(folder: str, round: int, dies_at: int | None = None) -> None:
    """Answer one request, which a server has left in the folder, and leave the reply there."""
    torch.set_num_threads(1)
    here = Path(folder)
    ward = client(
        here / "ward.ledger",
        name="killed",
        dataset=Slow(dies_at),
        steps=STEPS,
        replies=here / "replies",
        max_failures=1000,
    )
    answer = ward.answer(request(round, torch.load(here / f"request {round}", weights_only=True)))
    assert isinstance(answer, FitReply), answer
    torch.save(dict(answer.update), here / f"reply {round}")
