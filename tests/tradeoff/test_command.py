"""`dpdl sweep` as a user runs it, on a table of 144 records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpdl.tradeoff.cases import Case
from dpdl.tradeoff.journal import JOURNAL
from tests.tradeoff.command_line import dpdl

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]
WINE = ["sweep", "--table", "wine", "--batch-size", "144", "--epochs", "3", "--seeds", "2", "--epsilon", "1", "8"]
QUICK = [*WINE, "--jobs", "1", "--threads", "1"]


def test_a_sweep_leaves_rows_summary_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "out"
    assert dpdl(*QUICK, "--output", str(output)) == 0
    shown = capsys.readouterr()
    for word in ("<= 1.00", "<= 8.00", "no guarantee", "±", "icking the best"):
        assert word in shown.out
    assert "Written to" in shown.err
    assert {path.name for path in output.iterdir()} == {"rows.csv", JOURNAL, "runs", "sweep.json", "trade-off.png"}
    found = json.loads((output / "sweep.json").read_text())
    assert len(found["rows"]) == 6
    assert all(row["secure"] for row in found["rows"])
    assert all((output / "runs" / row["key"] / "model.pt").exists() for row in found["rows"])


def test_json_is_all_that_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dpdl(*QUICK, "--output", str(tmp_path), "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "sweep.json").read_text())


def test_it_goes_on_with_its_settings_and_refuses_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dpdl(*QUICK, "--output", str(tmp_path)) == 0
    journal = (tmp_path / JOURNAL).read_bytes()
    assert dpdl(*QUICK, "--output", str(tmp_path)) == 2
    assert "holds a sweep already" in capsys.readouterr().err
    assert dpdl("sweep", "--resume", "--jobs", "1", "--output", str(tmp_path)) == 0
    capsys.readouterr()
    assert dpdl("sweep", "--resume", "--lr", "2", "--output", str(tmp_path)) == 2
    assert "lrs was [5.0], now [2.0]" in capsys.readouterr().err
    assert (tmp_path / JOURNAL).read_bytes() == journal
    assert dpdl("sweep", "--resume", "--output", str(tmp_path / "none")) == 2
    assert "There is no sweep to resume" in capsys.readouterr().err


def test_failed_runs_are_named_and_the_exit_code_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Case.__call__

    def failing(case: Case, point: object) -> object:
        if getattr(point, "seed", 0) == 1:
            raise MemoryError("too large")
        return whole(case, point)  # type: ignore[arg-type]

    monkeypatch.setattr(Case, "__call__", failing)
    assert dpdl(*QUICK, "--output", str(tmp_path)) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "MemoryError: too large" in shown
    assert "3 runs failed" in shown


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--epsilon", "0"], "positive"),
        (["--batch-size", "145"], "145 is more than the 144"),
        (["--data", "somewhere"], "not both"),
        (["--model", "papernot-cnn"], "is for images"),
        (["--select", "5"], "one epsilon"),
        (["--select-law", "poisson"], "give its mean"),
        (["--select", "5", "--epsilon", "1", "--held-out", "private"], "held_out='public'"),
        (["--seeds", "0"], "seeds is empty"),
        (["--seeds", "1" + 30 * "0"], "at most 100,000"),
        (["--epsilon", "nan"], "NaN"),
        (["--epochs", "0"], "epochs must be >= 1"),
        (["--lr", "inf"], "positive finite"),
        (["--threads", "1000000000000"], "at most 1,024"),
        (["--select", "1e308", "--epsilon", "1"], "at most 1e+06"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_spent(
    options: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dpdl(*QUICK, *options, "--output", str(tmp_path / "out")) == 2
    last = capsys.readouterr().err.strip()
    assert word in " ".join(last.split())
    assert "Traceback" not in last
    assert not (tmp_path / "out").exists()


def test_one_run_is_chosen_within_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*QUICK, "--epsilon", "3", "--max-grad-norm", "0.1", "0.5", "--select", "4", "--select-law", "geometric"]
    assert dpdl(*options, "--insecure-seed", "3", "--output", str(tmp_path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert 2.9 < found["selection"]["epsilon"] <= 3
    assert len(found["rows"]) == 1
    assert (tmp_path / "selected" / "model.pt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"secret", "selected", "selected.json"}
    assert dpdl("sweep", "--resume", "--jobs", "1", "--output", str(tmp_path), "--json") == 0
    assert json.loads(capsys.readouterr().out) == found


def begun_and_killed(output: Path, *options: str, sign: int) -> tuple[int, str]:
    """The command as a program of its own, sent a signal once its journal has a line; exit code and messages."""
    command = [sys.executable, "-m", "tests.tradeoff.command_line", *WINE, "--epochs", "3000", *options]
    process = subprocess.Popen(
        [*command, "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    paths = [output / JOURNAL, output / "secret" / JOURNAL]
    while time.monotonic() < deadline and not any(path.exists() and "begun" in path.read_text() for path in paths):
        time.sleep(0.05)
    os.killpg(process.pid, sign)
    _, messages = process.communicate(timeout=60)
    return process.returncode, messages


@pytest.mark.parametrize(
    "options",
    [["--epochs", "40"], ["--epsilon", "3", "--select", "3", "--select-law", "geometric", "--epochs", "40"]],
    ids=["rows", "selection"],
)
def test_after_kill_9_resume_goes_on_with_the_saved_settings(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = begun_and_killed(tmp_path, *options, "--jobs", "1", "--threads", "1", sign=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "sweep.json").exists()
    assert not (tmp_path / "selected").exists()
    assert dpdl("sweep", "--resume", "--jobs", "1", "--threads", "1", "--output", str(tmp_path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    if found["selection"] is None:
        assert len(found["rows"]) == 6
        assert any("begun 5 times in all" in remark for remark in found["remarks"])
    else:
        assert found["rows"][0]["epsilon"] == found["selection"]["epsilon"]
        report = (tmp_path / "selected" / "report.json").read_text()
        assert json.loads(report)["epsilon"] == found["selection"]["epsilon"]


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(tmp_path: Path) -> None:
    # As a terminal does: to all processes of the sweep.
    code, messages = begun_and_killed(tmp_path, "--jobs", "2", sign=signal.SIGINT)
    assert code == 130, messages
    assert "dpdl sweep --resume --output" in messages
    assert "Traceback" not in messages
