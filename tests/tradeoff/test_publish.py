"""What leaves the private side of a selection: the claim of run and choice everywhere, and no trace of the others."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from accountants import Gaussian, Repetitions
from dpdl.privacy_report import PrivacyReport
from dpdl.report import report_page
from dpdl.tradeoff import Outcome, Point, SweepResult
from dpdl.tradeoff.journal import JOURNAL
from tests.tradeoff import small_training
from tests.tradeoff.small_training import small

CHOICE: dict[str, Any] = {
    "epsilons": (2.0,),
    "max_grad_norms": (0.5, 1.0),
    "held_out": "public",
    "select": Repetitions(mean=6.0, shape=1.0),
    "insecure_seed": 11,
    "threads": 1,
}
LONG_AGO = 1_000_000_000


def train_and_save(point: Point) -> Outcome:
    """Saves weights and its own report, with times of long ago, as a run that ended before others has."""
    outcome = small_training.train(point)
    if point.folder is not None:
        inner = point.folder / "inner"
        inner.mkdir()
        for path in (point.folder / "own.json", inner / "again.json"):
            path.write_text(outcome.report.to_json())
        (inner / "metrics.json").write_text("{}")
        for path in (inner / "metrics.json", point.folder / "weights.txt", inner, point.folder):
            os.utime(path, (LONG_AGO, LONG_AGO))
    return outcome


def train_and_release_more(point: Point) -> Outcome:
    """Its report covers a release that no plan of the sweep has."""
    _, optimizer = small_training.fitted(point)
    optimizer.ledger.record(Gaussian(0.5), label="mean of the ages")
    return Outcome(score=1.0, report=optimizer.report(point.delta))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("selection")


@pytest.fixture(scope="module")
def result(output: Path) -> SweepResult:
    return small(train_and_save, **CHOICE, output=output)


def test_every_published_epsilon_is_of_run_and_choice(result: SweepResult, tmp_path: Path) -> None:
    assert result.selection is not None
    of_both, of_one = result.selection.epsilon, result.selection.epsilon_of_one_run
    assert of_one < 0.8 * of_both, "the two could not be told apart"
    found = json.loads(result.to_json())
    for row in (found["rows"][0], found["selection"]["chosen"]):
        assert row["epsilon"] == row["planned_epsilon"] == row["report"]["epsilon"] == of_both
        assert row["report"]["planned_epsilon"] == of_both
        assert row["target"] == 2.0
    assert [group["epsilon"] for group in found["summaries"]] == [of_both]
    assert found["summaries"][0]["target"] == 2.0
    del found["selection"]["epsilon_of_one_run"], found["selection"]["claim"]  # which say that they are of one run
    found["remarks"].pop(0)
    assert f"{of_one:.3f}"[:4] not in json.dumps(found)
    result.to_csv(tmp_path / "rows.csv")
    lines = [line for line in (tmp_path / "rows.csv").read_text().splitlines() if not line.startswith("#")]
    (row,) = csv.DictReader(lines)
    assert float(row["epsilon"]) == float(row["planned_epsilon"]) == of_both


def test_its_report_says_that_it_was_chosen_and_claims_no_less(result: SweepResult, output: Path) -> None:
    assert result.selection is not None
    written = PrivacyReport.from_json((output / "selected" / "report.json").read_text())
    embedded = PrivacyReport.from_json(json.dumps(result.rows[0].report))
    assert written == embedded
    assert written.epsilon == result.selection.epsilon
    assert written.notes[0].startswith("this run was chosen privately")
    assert "epsilon <= 2.00 at delta = 0.001" in written.notes[0]
    assert any("insecure_seed" in note for note in written.notes)
    assert written.readings() is None, "readings of one run's steps claim less than the choice costs"
    assert "chosen privately" in report_page(written)


def test_no_report_of_the_single_run_is_copied(output: Path) -> None:
    files = {str(path.relative_to(output)) for path in (output / "selected").rglob("*") if path.is_file()}
    assert files == {"selected/report.json", "selected/weights.txt", "selected/inner/metrics.json"}


def test_files_tell_nothing_of_when_the_chosen_run_ended(result: SweepResult, output: Path) -> None:
    assert result.rows
    for path in (output / "selected", *(output / "selected").rglob("*")):
        found = path.stat()
        assert found.st_mtime > time.time() - 3600, path
        assert found.st_atime > time.time() - 3600, path


def test_a_report_of_more_than_the_plan_is_no_row(tmp_path: Path) -> None:
    result = small(train_and_release_more, epsilons=(1.0,), seeds=(0,), baseline=False)
    assert "mean of the ages" in str(result.rows[0].error)
    chosen = small(train_and_release_more, **CHOICE, output=tmp_path)
    assert chosen.rows == ()
    assert "mean of the ages" in (tmp_path / "secret" / JOURNAL).read_text()
