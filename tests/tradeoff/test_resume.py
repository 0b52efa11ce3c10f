"""A sweep that was killed goes on, and makes no finished run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dpdl.errors import CheckpointError
from dpdl.tradeoff.journal import JOURNAL
from tests.tradeoff import small_training
from tests.tradeoff.small_training import small

ROOT = Path(__file__).parents[2]


def calls(folder: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in (folder / "notes").read_text().splitlines())


def finished(folder: Path) -> int:
    path = folder / "out" / JOURNAL
    return path.read_text().count('"row"') if path.exists() else 0


def gone(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@pytest.mark.parametrize("jobs", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_after_kill_9_it_goes_on_and_repeats_no_finished_row(jobs: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.tradeoff.small_training", str(tmp_path), str(jobs)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while finished(tmp_path) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before, done = calls(tmp_path), finished(tmp_path)
    assert 2 <= done < 6
    workers = {int(line.split()[1]) for line in (tmp_path / "notes").read_text().splitlines()}
    while not all(gone(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(gone(worker) for worker in workers), "processes outlive the sweep"

    settings = {"notes": str(tmp_path / "notes"), "sleep": 0.0}
    common: dict[str, Any] = {"threads": 1, "insecure_seed": 5}
    asked = {"settings": {**settings, "sleep": 0.4}}
    result = small(small_training.train_noted, output=tmp_path / "out", resume=True, **common, **asked)
    after = calls(tmp_path)
    again = [key for key in after if after[key] > 1]
    assert len(result.rows) == 6
    assert not result.failed
    assert len(again) <= jobs
    assert sum(after.values()) == 6 + len(again)
    assert all(key in before for key in again)

    whole = small(small_training.train_noted, settings=settings, **common)
    assert [row.score for row in result.rows] == [row.score for row in whole.rows]
    if any(row.private and row.key in again for row in result.rows):
        assert result.epsilon_of_all > whole.epsilon_of_all, "a run that was cut short has touched the data"


def test_a_sweep_that_is_whole_makes_no_run(tmp_path: Path) -> None:
    settings = {"notes": str(tmp_path / "notes"), "sleep": 0.0}
    first = small(small_training.train_noted, settings=settings, output=tmp_path / "out")
    again = small(small_training.train_noted, settings=settings, output=tmp_path / "out", resume=True)
    assert sum(calls(tmp_path).values()) == 6
    assert again.to_dict() == first.to_dict()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"epsilons": (1.0, 3.0)}, r"epsilons was \[1.0, 4.0\], now \[1.0, 3.0\]"),
        ({"seeds": (0, 1, 2)}, r"seeds was \[0, 1\], now \[0, 1, 2\]"),
        ({"held_out": "public"}, "held_out was 'private', now 'public'"),
        ({"insecure_seed": 3}, "insecure_seed was None, now 3"),
        ({"train": small_training.train_or_fail}, "train was .*train.*, now .*train_or_fail"),
    ],
)
def test_other_settings_are_refused_with_what_differs(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    small(output=tmp_path)
    before = (tmp_path / JOURNAL).read_bytes()
    with pytest.raises(CheckpointError, match=said):
        small(**{"output": tmp_path, "resume": True, **changed})
    assert (tmp_path / JOURNAL).read_bytes() == before


def test_a_line_cut_short_is_dropped_and_any_other_damage_refused(tmp_path: Path) -> None:
    whole = small(output=tmp_path, insecure_seed=2, threads=1)
    path = tmp_path / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    again = small(output=tmp_path, insecure_seed=2, threads=1, resume=True)
    assert [row.score for row in again.rows] == [row.score for row in whole.rows]
    assert path.read_bytes().count(b"begun") == 7

    path.write_bytes(lines[0] + b"nonsense\n" + b"".join(lines[1:]))
    with pytest.raises(CheckpointError, match="damaged in line 2"):
        small(output=tmp_path, insecure_seed=2, resume=True)


def test_failed_rows_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = small(small_training.train_or_fail, output=tmp_path)
    monkeypatch.setattr(small_training.train_or_fail, "__code__", small_training.train.__code__)  # mended
    mended = small(small_training.train_or_fail, output=tmp_path, resume=True)
    assert len(broken.failed) == 3
    assert not mended.failed
    assert mended.epsilon_of_all > broken.epsilon_of_all


def test_a_sweep_in_use_is_refused(tmp_path: Path) -> None:
    def train(point: Any) -> Any:
        with pytest.raises(CheckpointError, match="in use"):
            small(train, output=tmp_path, resume=True)
        return small_training.train(point)

    assert not small(train, output=tmp_path).failed


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupt_keeps_what_is_finished(jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpdl.tradeoff.journal import Journal

    finish = Journal.finish

    def interrupted(journal: Journal, row: Any) -> None:
        finish(journal, row)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(output=tmp_path, jobs=jobs, threads=1)
    monkeypatch.undo()
    result = small(output=tmp_path, resume=True)
    assert len(result.rows) == 6
    assert (tmp_path / JOURNAL).read_text().count('"row"') == 6
