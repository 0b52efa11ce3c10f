"""kill -9 between and inside rounds: no spending forgotten, none counted twice, the federation goes on."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

import accountants
import dpdl
from dpdl.federated.client_report import rounds_in
from dpdl.federated.inventory import Inventory
from dpdl.federated.messages import FitReply
from dpdl.federated.server import FederatedServer
from tests.federated.clients.killed import ROUNDS, STEPS, answer_one, take_part
from tests.federated.clients.warm import WARM
from tests.federated.clients.worlds import DELTA, client, network


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Each process is forked from one that has taken part once, and holds nothing of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.federated.clients.warm"])
    os.environ[WARM] = "yes"
    forkserver.ensure_running()
    del os.environ[WARM]
    return context


def run(
    processes: ForkServerContext, *arguments: object, killed_after: float | None = None, target: Any = take_part
) -> int:
    process = processes.Process(target=target, args=arguments)
    process.start()
    process.join(killed_after)
    if killed_after is not None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def answered(folder: Path) -> dict[int, set[str]]:
    """By round, the digests of all answers that have left."""
    found: dict[int, set[str]] = {}
    for line in (folder / "server").read_text().splitlines() if (folder / "server").exists() else ():
        round, digest = line.split()
        found.setdefault(int(round), set()).add(digest)
    return found


def attempts(folder: Path) -> dict[str, list[int]]:
    """By run in the ledger, the steps of each attempt at it; opening it checks its chain."""
    ledger = dpdl.LedgerFile(folder / "ward.ledger")
    found: dict[str, dict[str, int]] = {}
    for run_name in ledger.runs:
        for segment in ledger.of_run(run_name):
            of_run = found.setdefault(run_name, {})
            of_run[segment.branch] = of_run.get(segment.branch, 0) + segment.count
    return {name: list(of_run.values()) for name, of_run in found.items()}


def check(folder: Path, *, killed: int, seeded: bool) -> None:
    """All that must be so, once all rounds are answered."""
    given = answered(folder)
    assert sorted(given) == list(range(1, ROUNDS + 1))
    assert all(len(digests) == 1 for digests in given.values()), "a round was answered twice, with other noise"
    spent = attempts(folder)
    assert len(spent) == ROUNDS
    assert all(steps == STEPS for each in spent.values() for steps in each), (
        "an attempt was forgotten, or counted twice"
    )
    repeated = sum(len(each) - 1 for each in spent.values())
    assert repeated <= (0 if seeded else killed)
    ledger = dpdl.LedgerFile(folder / "ward.ledger")
    assert ledger.releases == STEPS * (ROUNDS + repeated)
    expected = accountants.epsilon(noise_multiplier=1.0, sample_rate=0.5, steps=ledger.releases, delta=DELTA)
    assert ledger.epsilon(DELTA) == expected
    assert rounds_in(ledger.entries) == {"federation": ROUNDS}


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(
    ("where", "count", "attempted"),
    [
        ("reading", 1, 1),  # the first record of the first round: recorded, nothing taken
        ("reading", 60, 2),
        ("stepping", STEPS + 2, 2),  # in the middle of the second round
        ("storing", 3, 3),  # all steps of the third are taken, and its reply is not kept
        ("stored", 3, 3),  # its reply is kept, and was not sent
    ],
)
def test_killed_at_the_worst_moments(
    processes: ForkServerContext, tmp_path: Path, where: str, count: int, attempted: int, seed: int | None
) -> None:
    assert run(processes, str(tmp_path), seed, where, count) == -signal.SIGKILL
    assert sorted(answered(tmp_path)) == list(range(1, attempted))
    assert [sum(each) for each in attempts(tmp_path).values()] == [STEPS] * attempted  # all of the round's steps
    assert run(processes, str(tmp_path), seed) == 0
    check(tmp_path, killed=0 if where == "stored" else 1, seeded=seed is not None)
    twice = max(len(each) for each in attempts(tmp_path).values())
    assert twice == (1 if seed is not None or where == "stored" else 2)


def test_the_federation_goes_on_without_a_client_that_was_killed_and_with_it_again(
    processes: ForkServerContext, tmp_path: Path
) -> None:
    """Client "killed" is a process of its own for each round; in the second it dies in the middle."""
    server, well = FederatedServer(network()), client(name="well", steps=STEPS)
    outcomes = []
    for round in (1, 2, 3):
        server.open_round(["well", "killed"])
        asked = server.request()
        server.add(well.answer(asked))
        torch.save(dict(asked.state), tmp_path / f"request {round}")
        code = run(processes, str(tmp_path), round, 20 if round == 2 else None, target=answer_one)
        assert code == (-signal.SIGKILL if round == 2 else 0)
        if code == 0:
            update = torch.load(tmp_path / f"reply {round}", weights_only=True)
            server.add(FitReply(client="killed", round=round, update=update, base=asked.state, releases=Inventory()))
        outcomes.append(dict(server.close_round().private.outcomes))
    assert [each["killed"] for each in outcomes] == ["accepted", "lost", "accepted"]
    assert [each["well"] for each in outcomes] == ["accepted"] * 3
    ledger = dpdl.LedgerFile(tmp_path / "ward.ledger")
    assert ledger.releases == 3 * STEPS  # the round that was lost is spent
    first = torch.load(tmp_path / "reply 3", weights_only=True)
    assert run(processes, str(tmp_path), 3, target=answer_one) == 0  # asked again: the same bytes, for nothing
    again = torch.load(tmp_path / "reply 3", weights_only=True)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert ledger.releases == 3 * STEPS


def kill_at_random(processes: ForkServerContext, folder: Path, *, kills: int, seed: int | None) -> int:
    """Kill processes at random moments until that many were; then let one end. How many were killed inside rounds."""
    moments = random.Random(f"{folder.name} {seed}")
    longest, killed = 0.3, 0
    while killed < kills:
        code = run(processes, str(folder), seed, killed_after=moments.uniform(0.0, longest))
        killed += code == -signal.SIGKILL
        if code == 0:
            break
        longest = min(longest * 1.1, 20.0)
    assert run(processes, str(folder), seed) == 0
    return killed


@pytest.mark.parametrize("seed", [None, 5])
def test_killed_at_a_few_random_moments(processes: ForkServerContext, tmp_path: Path, seed: int | None) -> None:
    killed = kill_at_random(processes, tmp_path, kills=5, seed=seed)
    check(tmp_path, killed=killed, seeded=seed is not None)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [None, 5])
def test_killed_at_fifty_random_moments(processes: ForkServerContext, tmp_path: Path, seed: int | None) -> None:
    killed = 0
    for federation in range(50):  # one may end before it was killed often
        folder = tmp_path / str(federation)
        folder.mkdir()
        now = kill_at_random(processes, folder, kills=min(10, 50 - killed), seed=seed)
        check(folder, killed=now, seeded=seed is not None)
        killed += now
        if killed >= 50:
            return
    raise AssertionError(f"only {killed} processes were killed")
