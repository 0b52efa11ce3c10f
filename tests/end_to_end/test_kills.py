"""A run that is killed at any moment loses time, and nothing else.

Three kills by default; `-m slow` makes fifty.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from accountants import PRVAccountant
from dpdl.ledger_file import LedgerFile
from tests.small_run import same

ROOT = Path(__file__).parents[2]
Draws = dict[tuple[str, int, int, int], set[str]]

TIMES = [  # kills, steps, reserved at a time
    pytest.param(3, 28, 1, id="3 kills"),
    pytest.param(3, 28, 8, id="3 kills of a run that reserves", marks=pytest.mark.slow),
    pytest.param(50, 400, 1, id="50 kills", marks=pytest.mark.slow),
    pytest.param(50, 400, 8, id="50 kills of a run that reserves", marks=pytest.mark.slow),
]


def run(folder: Path, *, seed: str, kills: int, steps: int, reserve: int) -> Path:
    arguments = [str(folder), seed, str(kills), str(steps), str(reserve)]
    command = [sys.executable, "-m", "tests.end_to_end.killed_run", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == kills, "the run was over before it could be killed often enough"
    return folder


def draws(folder: Path) -> list[tuple[tuple[str, int, int, int], str]]:
    """Every draw: (stream, message, first word, words), and the digest of what came out.

    A kill can tear the line of the last one, whose words were not used then.
    """
    lines = (folder / "draws").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("]")]
    return [((label, message, start, count), digest) for label, message, start, count, digest in rows]


def saved(folder: Path) -> dict[str, Any]:
    state = torch.load(folder / "run.pt", weights_only=True)
    private = state["optimizer"]["dpdl"]
    for name in ("run", "kept_in"):  # drawn anew for every run and every file
        del private[name]
    return {name: state[name] for name in ("model", "optimizer", "scheduler")}


def spent(folder: Path) -> list[tuple[str, Any, int]]:
    return [(entry.label, entry.event, entry.count) for entry in LedgerFile(folder / "data.ledger").entries]


@pytest.mark.parametrize(("kills", "steps", "reserve"), TIMES)
def test_under_an_insecure_seed_a_killed_run_ends_as_one_that_was_not(
    tmp_path: Path, kills: int, steps: int, reserve: int
) -> None:
    folder = run(tmp_path, seed="7", kills=kills, steps=steps, reserve=reserve)
    whole, killed = folder / "whole", folder / "killed"
    assert same(saved(whole), saved(killed))
    assert spent(whole) == spent(killed)
    assert [count for _, _, count in spent(whole)] == [steps]
    known = dict(draws(whole))
    assert len(known) == len(draws(whole)), "the unkilled run drew something twice"
    again = draws(killed)
    assert len(again) > len(known), "no step was ever repeated: the kills came to nothing"
    # What a secure run must never show: the same drawn twice.
    assert len({digest for _, digest in again}) < len(again)
    assert dict(again) == known
    assert all(known[address] == digest for address, digest in again)


@pytest.mark.parametrize(("kills", "steps", "reserve"), TIMES)
def test_a_secure_run_never_draws_the_same_again_and_forgets_nothing(
    tmp_path: Path, kills: int, steps: int, reserve: int
) -> None:
    folder = run(tmp_path, seed="secure", kills=kills, steps=steps, reserve=reserve) / "killed"
    drawn = draws(folder)
    digests = [digest for _, digest in drawn]
    assert len(set(digests)) == len(digests)
    releases = sum(label == "noise" for (label, *_), _ in drawn)
    ((label, event, count),) = spent(folder)
    assert (label, count) == ("step", steps)
    assert releases <= steps, "noise left that the ledger does not have"
    assert releases > steps - (kills + 1) * (4 + reserve), "steps were spent that no kill explains"
    report = json.loads((folder / "report.json").read_text())
    assert report["epsilon"] == report["dataset_epsilon"] == PRVAccountant().compose(event, steps).epsilon(1e-5)
