"""What the system or a caller may do to a ledger at a bad moment: one clear error, and nothing lost or bricked."""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from accountants import Gaussian, NeighboringRelation
from dpdl.budget import Budget
from dpdl.errors import BudgetExceededError, LedgerError, ParameterError
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.tally import Tally
from tests.small_ledger import STEP, a_ledger

ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE
ARGUMENTS: list[dict[str, Any]] = [
    {"number": -1},
    {"number": True},
    {"number": 1.5},
    {"number": "a"},
    {"ahead": 2.5},
    {"ahead": 0},
    {"label": ""},
    {"label": 3},
    {"run": None},
    {"branch": 3},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.ledger"


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_arguments_are_checked_before_a_line_is_written(path: Path, arguments: dict[str, Any]) -> None:
    ledger, memory = a_ledger(path, 1), Ledger(relation=ADD_OR_REMOVE)
    before = path.read_bytes()
    for each in (ledger, memory):
        for ask in (each.record, each.claim):
            with pytest.raises(ParameterError):
                ask(STEP, **arguments)
    assert path.read_bytes() == before
    assert memory.releases == 0
    assert LedgerFile(path).releases == 1


def test_a_line_that_would_not_read_back_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = a_ledger(path, 1)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("dpdl.ledger_lines.Event.from_json", lambda text: Gaussian(7.0))
        with pytest.raises(LedgerError, match="read back"):
            ledger.record(STEP)
    assert path.read_bytes() == before


def test_a_path_holds_wherever_the_process_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = LedgerFile("data.ledger")
    monkeypatch.chdir("/")
    ledger.record(STEP)
    assert ledger.releases == 1


def test_locks_that_the_file_system_refuses_are_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = a_ledger(path, 1)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr("dpdl.journal.fcntl.flock", refuse)
        with pytest.raises(LedgerError, match=r"data\.ledger cannot be locked: No locks available"):
            ledger.record(STEP)
    ledger.record(STEP)
    assert ledger.releases == 2


@pytest.mark.parametrize("failure", ["no room", "half"])
def test_a_torn_end_that_cannot_be_set_aside_stays(path: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    a_ledger(path, 1)
    with path.open("ab") as file:
        file.write(b'{"n": 2, "kind": "sp')
    before = path.read_bytes()
    real = os.write

    def short(file: int, data: bytes) -> int:
        return real(file, data[: len(data) // 2])

    if failure == "half":
        monkeypatch.setattr("dpdl.journal.os.write", short)
    else:
        path.with_name("data.ledger.torn").mkdir()
    with pytest.raises(LedgerError, match=r"data\.ledger\.torn"):
        LedgerFile(path)
    assert path.read_bytes() == before


def test_a_line_that_the_disk_did_not_take_is_synced_before_it_is_relied_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = a_ledger(path, 1)
    synced: list[int] = []

    def fail(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("dpdl.journal._sync_data", fail)
        for _ in range(2):
            with pytest.raises(LedgerError, match="Input/output error"):
                ledger.record(STEP, run="a", branch="seeded", number=0)
    monkeypatch.setattr("dpdl.journal._sync_data", synced.append)
    ledger.record(STEP, run="a", branch="seeded", number=0)
    assert synced
    assert ledger.releases == 2


def test_a_signals_handler_may_look_and_not_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in the thread that has the lock: waiting for it would be for ever."""
    ledger = a_ledger(path, 1)
    seen: list[Any] = []

    def handler(file: int) -> None:
        seen.append(ledger.releases)
        with pytest.raises(LedgerError, match="this very thread"):
            ledger.record(STEP, run="other")

    with monkeypatch.context() as patch:
        patch.setattr("dpdl.journal._sync_data", handler)
        ledger.record(STEP)
    assert seen == [1]
    assert ledger.releases == LedgerFile(path).releases == 2


@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_fork_while_another_thread_is_in_the_ledger_does_not_hang(path: Path, where: str) -> None:
    ledger: Any = LedgerFile(path) if where == "file" else Ledger(relation=ADD_OR_REMOVE)
    lock = ledger._one_thread if where == "file" else ledger._lock
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(10)
    child = os.fork()
    if child == 0:
        code = 3
        try:
            threading.Timer(10, os._exit, (4,)).start()
            ledger.record(STEP)
            code = 0
        except LedgerError:
            code = 1  # in memory: nobody would know
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == (0 if where == "file" else 1)
    assert ledger.releases == (1 if where == "file" else 0)


def test_an_interrupt_while_a_line_is_taken_leaves_a_whole_ledger(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = a_ledger(path, 2)
    real = Tally.add

    def interrupted(self: Tally, new: Any) -> None:
        real(self, new)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tally, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.record(STEP)
    assert ledger.releases == LedgerFile(path).releases == 3


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_ledgers_are_not_copied(path: Path, copied: Any) -> None:
    for ledger in (LedgerFile(path), Ledger(relation=ADD_OR_REMOVE)):
        with pytest.raises(LedgerError, match="cannot be copied"):
            copied(ledger)


def test_threads_share_a_ledger_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last that fits is granted once: another thread comes in between asking and adding."""
    room = Ledger(relation=ADD_OR_REMOVE)
    room.record(Gaussian(3.0))
    ledger = Ledger(relation=ADD_OR_REMOVE, budget=Budget(epsilon=room.epsilon(1e-5), delta=1e-5))
    granted: list[int] = []
    asked = threading.Barrier(2)
    refuse = Ledger._refuse

    def slow(self: Ledger, *arguments: Any) -> None:
        refuse(self, *arguments)
        with contextlib.suppress(threading.BrokenBarrierError):
            asked.wait(0.5)

    monkeypatch.setattr(Ledger, "_refuse", slow)

    def record() -> None:
        try:
            ledger.record(Gaussian(3.0))
        except BudgetExceededError:
            return
        granted.append(1)

    threads = [threading.Thread(target=record) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(granted) == ledger.releases == 1


def test_many_kinds_of_release_under_a_budget_cost_few_computations(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    allows = Budget.allows

    def counted(self: Budget, counts: Any, relation: Any) -> bool:
        calls.append(len(counts))
        return allows(self, counts, relation)

    monkeypatch.setattr(Budget, "allows", counted)
    ledger = Ledger(relation=ADD_OR_REMOVE, budget=Budget(epsilon=3.0, delta=1e-5))
    for i in range(8):
        ledger.record(Gaussian(60.0 + i))
    calls.clear()
    ledger.record(Gaussian(80.0))
    assert len(calls) <= 8
