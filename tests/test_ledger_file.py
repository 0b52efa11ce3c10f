"""The ledger in a file: nothing recorded is ever lost, nothing damaged is taken for good, and processes add up."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from accountants import (
    Composed,
    Gaussian,
    NeighboringRelation,
    PoissonSampled,
    PRVAccountant,
    SampledWithoutReplacement,
)
from dpdl.budget import Budget
from dpdl.errors import BudgetExceededError, LedgerError, ParameterError, UnsupportedEventError
from dpdl.ledger_file import LedgerFile
from dpdl.tally import Entry
from tests.small_ledger import BUDGET, OTHER, STEP, a_ledger


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests kill no machine, and the disk is slow."""
    monkeypatch.setattr("dpdl.journal._sync_data", lambda file: None)
    monkeypatch.setattr("dpdl.journal.os.fsync", lambda file: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.ledger"


def record_until_refused(ledger: LedgerFile, **settings: Any) -> None:
    while True:
        ledger.record(STEP, **settings)


# ── what is recorded ────────────────────────────────────────────────────────────────────────────────


def test_a_new_ledger_has_spent_nothing(path: Path) -> None:
    ledger = LedgerFile(path)
    assert (ledger.releases, ledger.entries, ledger.epsilon(1e-5), ledger.budget) == (0, (), 0.0, None)


def test_what_one_object_records_another_one_reads(path: Path) -> None:
    written, read = LedgerFile(path), LedgerFile(path)
    for _ in range(3):
        written.record(STEP, run="a")
    written.record(OTHER, label="mean", run="statistics")
    read.record(STEP, run="b")
    expected = (
        Entry(event=STEP, count=3, run="a"),
        Entry(event=OTHER, count=1, label="mean", run="statistics"),
        Entry(event=STEP, count=1, run="b"),
    )
    assert written.entries == read.entries == LedgerFile(path).entries == expected
    assert written.runs == ("a", "statistics", "b")
    oracle = PRVAccountant().compose(Composed([STEP * 4, OTHER]))
    assert read.interval(1e-5) == oracle.interval(1e-5)
    assert (written.id, written.releases) == (read.id, 5)


def test_a_release_is_on_the_disk_before_record_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = LedgerFile(path)
    synced: list[bytes] = []
    monkeypatch.setattr("dpdl.journal._sync_data", lambda file: synced.append(path.read_bytes()))
    ledger.record(STEP)
    assert synced == [path.read_bytes()]
    assert json.loads(synced[0].splitlines()[-1])["count"] == 1


def test_every_line_is_json_with_its_number(path: Path) -> None:
    a_ledger(path, 5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["n"] for line in lines] == list(range(6))
    assert [line["kind"] for line in lines] == ["header"] + ["spent"] * 5


def test_an_event_without_a_proof_is_refused_and_not_recorded(path: Path) -> None:
    ledger = LedgerFile(path)
    before = path.read_bytes()
    with pytest.raises(UnsupportedEventError):
        ledger.record(SampledWithoutReplacement(5, 100, Gaussian(1.0)))  # of replacing an example only
    with pytest.raises(ParameterError, match="event"):
        ledger.record("a step")  # type: ignore[arg-type]
    assert path.read_bytes() == before


@pytest.mark.parametrize("reserve", [0, -1, 1.5, "many"])
def test_nonsense_is_refused_before_a_file_is_made(path: Path, reserve: Any) -> None:
    with pytest.raises(ParameterError, match="reserve"):
        LedgerFile(path, reserve=reserve)
    with pytest.raises(ParameterError, match="budget"):
        LedgerFile(path, budget=3.0)  # type: ignore[arg-type]
    assert not path.exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"nowhere.data\.ledger cannot be made"):
        LedgerFile(tmp_path / "nowhere" / "data.ledger")


# ── the same number is the same release ─────────────────────────────────────────────────────────────


def test_a_repeated_number_counts_once(path: Path) -> None:
    for _ in range(2):
        ledger = LedgerFile(path)
        for number in range(4):
            ledger.record(STEP, run="a", number=number)
    ledger.record(STEP, run="b", number=0)
    ledger.record(STEP, label="clip", run="a", number=0)
    assert [entry.count for entry in ledger.entries] == [4, 1, 1]


def test_another_release_under_a_known_number_is_refused(path: Path) -> None:
    ledger = LedgerFile(path)
    ledger.record(STEP, run="a", number=0)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="another run"):
        ledger.record(PoissonSampled(0.1, Gaussian(1.0)), run="a", number=0)
    assert path.read_bytes() == before


def test_without_a_number_every_record_is_a_new_release(path: Path) -> None:
    for _ in range(2):
        LedgerFile(path).record(STEP, run="a")
    assert LedgerFile(path).releases == 2


# ── reservations ────────────────────────────────────────────────────────────────────────────────────


def test_a_reservation_saves_lines_and_what_was_not_used_is_given_back(path: Path) -> None:
    with LedgerFile(path, reserve=8) as ledger:
        for _ in range(11):
            ledger.record(STEP, run="a", ahead=100)
        assert len(path.read_bytes().splitlines()) == 3  # header and two reservations
        assert LedgerFile(path).releases == 16
    assert LedgerFile(path).releases == ledger.releases == 11
    ledger.record(STEP, run="a")
    assert LedgerFile(path).releases == 12


def test_no_more_is_reserved_than_a_run_may_take(path: Path) -> None:
    ledger = LedgerFile(path, reserve=8)
    ledger.record(STEP, run="a", ahead=3)
    assert ledger.releases == 3
    ledger.record(STEP, run="b")
    assert ledger.releases == 4


def test_a_crash_keeps_what_was_reserved(path: Path) -> None:
    LedgerFile(path, reserve=8).record(STEP, run="a", ahead=100)
    later = LedgerFile(path, reserve=8)
    later.give_back()
    assert later.releases == 8
    later.record(STEP, run="a", ahead=100)
    assert later.releases == 16


def test_what_may_be_repeated_elsewhere_is_not_given_back(path: Path) -> None:
    with LedgerFile(path, reserve=8) as ledger:
        ledger.record(STEP, run="a", number=0, ahead=100)
        other = LedgerFile(path)
        for number in range(8):
            other.record(STEP, run="a", number=number)
    assert LedgerFile(path).releases == 8


def test_numbers_that_were_given_back_are_never_used_again(path: Path) -> None:
    first, second = LedgerFile(path, reserve=4), LedgerFile(path, reserve=4)
    first.record(STEP, run="a", ahead=9)
    second.record(STEP, run="a", ahead=9)
    first.give_back()
    second.give_back()
    first.record(STEP, run="a", ahead=9)
    assert [(s.first, s.count) for s in LedgerFile(path).of_run("a")] == [(0, 1), (4, 1), (8, 4)]


def test_another_event_gives_the_reservation_back(path: Path) -> None:
    ledger = LedgerFile(path, reserve=4)
    ledger.record(STEP, run="a", ahead=9)
    ledger.record(OTHER, run="a", ahead=1)
    assert [(entry.event, entry.count) for entry in ledger.entries] == [(STEP, 1), (OTHER, 1)]


def test_a_forked_process_does_not_use_what_its_parent_holds(path: Path) -> None:
    ledger = LedgerFile(path, reserve=4)
    ledger.record(STEP, run="a", ahead=9)
    child = os.fork()
    if child == 0:
        try:
            ledger.record(STEP, run="a", ahead=1)
            ledger.give_back()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    ledger.record(STEP, run="a", ahead=9)
    assert ledger.releases == 5


# ── budgets ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_budget_refuses_the_release_that_would_overspend_and_nothing_changes(path: Path) -> None:
    ledger = LedgerFile(path, budget=BUDGET)
    with pytest.raises(BudgetExceededError, match=r"budget of the ledger .*epsilon 1 at delta 1e-05.*is spent"):
        record_until_refused(ledger)
    before = path.read_bytes()
    with pytest.raises(BudgetExceededError):
        ledger.record(STEP)
    assert path.read_bytes() == before
    taken = ledger.releases
    assert ledger.epsilon(1e-5) <= 1.0 < PRVAccountant().compose(STEP, taken + 1).epsilon(1e-5)
    assert LedgerFile(path).budget == BUDGET


def test_one_budget_holds_for_all_who_share_the_file(path: Path) -> None:
    ledgers = [LedgerFile(path, budget=BUDGET), LedgerFile(path, budget=BUDGET)]
    kinds = [STEP, PoissonSampled(0.05, Gaussian(1.2))]
    refused = [False, False]
    while not all(refused):
        for i in (0, 1):
            try:
                ledgers[i].record(kinds[i], run="ab"[i])
            except BudgetExceededError:
                refused[i] = True
    counts = {entry.event: entry.count for entry in ledgers[0].entries}
    spent = PRVAccountant().compose(Composed([kind * counts[kind] for kind in kinds]))
    assert spent.epsilon(1e-5) <= 1.0
    for kind in kinds:
        more = PRVAccountant().compose(Composed([k * (counts[k] + (k == kind)) for k in kinds]))
        assert more.epsilon(1e-5) > 1.0


def test_what_is_claimed_cannot_be_taken_by_others(path: Path) -> None:
    mine, other = LedgerFile(path, budget=BUDGET), LedgerFile(path)
    while mine.remaining(OTHER) > 1:  # type: ignore[operator]
        mine.record(OTHER)
    taken = mine.releases
    for _ in range(3):
        mine.claim(OTHER, run="mine")
    assert LedgerFile(path).releases == taken + 1
    assert not other.fits(OTHER)
    with pytest.raises(BudgetExceededError):
        other.record(OTHER, run="other")
    assert mine.fits(OTHER, run="mine")
    mine.record(OTHER, run="mine")
    assert not mine.fits(OTHER, run="mine")
    with pytest.raises(BudgetExceededError):
        mine.record(OTHER, run="mine")
    assert LedgerFile(path).releases == taken + 1


@pytest.mark.parametrize("reserve", [1, 7, 64])
def test_a_reservation_wastes_nothing_at_the_end_of_the_budget(path: Path, reserve: int) -> None:
    with LedgerFile(path, budget=BUDGET, reserve=reserve) as ledger, pytest.raises(BudgetExceededError):
        record_until_refused(ledger, run="a", ahead=10**6)
    assert ledger.releases == LedgerFile(path.with_name("plain"), budget=BUDGET).remaining(STEP)


@pytest.mark.parametrize(
    "weaker",
    [Budget(epsilon=1.1, delta=1e-5), Budget(epsilon=1.0, delta=1e-4), Budget(epsilon=0.5, delta=1e-4)],
)
def test_opening_under_a_weaker_budget_is_refused(path: Path, weaker: Budget) -> None:
    LedgerFile(path, budget=BUDGET)
    with pytest.raises(LedgerError, match="weaker"):
        LedgerFile(path, budget=weaker)


def test_a_planned_budget_is_weaker_than_an_adaptive_one(path: Path) -> None:
    LedgerFile(path, budget=Budget(epsilon=1.0, delta=1e-5, adaptive=True))
    with pytest.raises(LedgerError, match="weaker"):
        LedgerFile(path, budget=BUDGET)


def test_a_stricter_budget_holds_for_who_asked_for_it(path: Path) -> None:
    LedgerFile(path, budget=BUDGET).record(OTHER)
    strict, plain = LedgerFile(path, budget=Budget(epsilon=0.21, delta=1e-5)), LedgerFile(path)
    with pytest.raises(BudgetExceededError, match=r"0\.21"):
        strict.record(OTHER)
    plain.record(OTHER)
    assert plain.budget == BUDGET


def test_another_relation_is_refused(path: Path) -> None:
    LedgerFile(path, relation=NeighboringRelation.REPLACE_ONE)
    with pytest.raises(LedgerError, match="replace_one"):
        LedgerFile(path)


# ── several processes and threads ───────────────────────────────────────────────────────────────────


def record_many(path: Path, run: str, count: int, reserve: int) -> None:
    with LedgerFile(path, reserve=reserve) as ledger:
        for _ in range(count):
            ledger.record(STEP, run=run, ahead=count)


@pytest.mark.parametrize("reserve", [1, 5])
def test_processes_append_at_once(path: Path, reserve: int) -> None:
    LedgerFile(path)
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=record_many, args=(path, run, 40, reserve)) for run in "abcd"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert {entry.run: entry.count for entry in LedgerFile(path).entries} == dict.fromkeys("abcd", 40)
    assert not path.with_name("data.ledger.torn").exists()


def test_who_records_waits_for_who_has_the_lock(path: Path) -> None:
    ledger = LedgerFile(path)
    done = threading.Event()

    def record() -> None:
        ledger.record(STEP)
        done.set()

    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert ledger.epsilon(1e-5) == 0.0  # who only reads shares the lock
        thread = threading.Thread(target=record)
        thread.start()
        assert not done.wait(0.3)
        assert len(path.read_bytes().splitlines()) == 1
    assert done.wait(10)
    thread.join()
    assert ledger.releases == 1


def test_threads_share_an_object(path: Path) -> None:
    ledger = LedgerFile(path)
    threads = [threading.Thread(target=lambda: [ledger.record(STEP) for _ in range(30)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.releases == LedgerFile(path).releases == 120


def test_two_who_make_the_file_at_once_share_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = LedgerFile(path)
    made.record(STEP)
    monkeypatch.setattr(Path, "exists", lambda self: False)  # as the other one saw it a moment ago
    assert LedgerFile(path).id == made.id
    assert LedgerFile(path).releases == 1
    assert os.listdir(path.parent) == [path.name]
