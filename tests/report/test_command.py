"""`dpdl report`: text, JSON and a page from a run's folder; exit codes; errors in one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dpdl import PrivacyReport
from dpdl.audit.result import AuditResult
from dpdl.claims import AdversaryReport, Claim
from dpdl.errors import ParameterError, PrivacyError
from dpdl.report import command
from tests.report.made import DELTA, a_report
from tests.report.reading import Read

REPORT = a_report()
AUDIT = AuditResult(
    attack="many runs", epsilon_lower=1.0, delta=DELTA, relation="add_or_remove", confidence=0.95, claimed_epsilon=3.3
)
TRAINING = {"history": [{"step": 480, "epsilon": 3.2, "test_accuracy": 0.93}]}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return REPORT.to_dict()


@pytest.fixture
def folder(tmp_path: Path, document: dict[str, Any]) -> Path:
    (tmp_path / "report.json").write_text(json.dumps({**document, "training": TRAINING}))
    return tmp_path


def main(*words: str | Path) -> int:
    """The command as the command line has it, with its errors."""
    import argparse

    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    arguments = parser.parse_args(["report", *map(str, words)])
    code = arguments.run(arguments)
    assert isinstance(code, int)
    return code


def test_a_folder_and_its_report_are_told_as_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(folder) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[0] == REPORT.sentence
    for words in ("480 x step", "1 false alarm in 100", "delta 1e-06: ", *REPORT.assumptions):
        assert words in told
    assert main(folder / "report.json") == 0
    assert capsys.readouterr().out == told


def test_another_delta_is_told_with_the_usual_ones(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(folder, "--delta", "3e-6") == 0
    assert "delta 3e-06: " in capsys.readouterr().out


def test_json_is_the_report_with_what_else_the_file_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(folder, "--json") == 0
    text = capsys.readouterr().out
    assert PrivacyReport.from_json(text) == REPORT
    assert json.loads(text)["training"] == TRAINING
    assert "audits" not in json.loads(text)


def test_a_page_is_written_with_accuracy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(folder, "--html", folder / "page.html") == 0
    assert "page.html" in capsys.readouterr().err
    assert "Test accuracy over the steps" in Read((folder / "page.html").read_text()).words


def test_an_audit_is_kept_in_the_json_and_a_contradiction_is_exit_code_1(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = folder / "good.json", folder / "bad.json"
    good.write_text(AUDIT.to_json())
    bad.write_text(dataclasses.replace(AUDIT, epsilon_lower=9.0).to_json())
    assert main(folder, "--audit", good, "--json") == 0
    (folder / "report.json").write_text(capsys.readouterr().out)
    assert main(folder) == 0
    assert AUDIT.attack in capsys.readouterr().out
    assert main(folder, "--audit", bad) == 1
    assert "CONTRADICTED" in capsys.readouterr().out


def test_what_dpdl_audit_prints_is_taken_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The audit of another relation is not held against the report's own epsilon, which it passes."""
    found = dataclasses.replace(AUDIT, relation="replace_one", epsilon_lower=5.0, claimed_epsilon=6.5)
    printed = {"schema": "dpdl.audit-run/1", "run": "r", "method": "membership", "membership": None}
    file = folder / "found.json"
    file.write_text(json.dumps({**printed, "audit": found.to_dict(), "consistent": True}))
    assert main(folder, "--audit", file) == 0
    assert "Beside this report: no contradiction" in capsys.readouterr().out
    higher = dataclasses.replace(found, epsilon_lower=7.0, claimed_epsilon=None)
    file.write_text(json.dumps({**printed, "audit": higher.to_dict(), "consistent": True}))
    assert main(folder, "--audit", file, "--html", folder / "page.html") == 1
    assert "THE CLAIM IS CONTRADICTED" in (folder / "page.html").read_text()
    file.write_text(json.dumps({**printed, "audit": None, "consistent": None}))
    with pytest.raises(ParameterError, match="no bound on epsilon"):
        main(folder, "--audit", file)
    file.write_text(json.dumps({**printed, "audit": 5}))
    with pytest.raises(ParameterError, match="Not an audit's result"):
        main(folder, "--audit", file)


def test_counts_of_any_size_can_be_shown(folder: Path) -> None:
    file = folder / "audit.json"
    details = {"canaries": 10**400, "rate": "inf", "x": {"y": [None]}}
    file.write_text(dataclasses.replace(AUDIT, details=details).to_json())
    assert main(folder, "--audit", file, "--html", folder / "page.html") == 0


def test_a_report_by_adversary_is_told_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = Claim(against="server", unit="record", because="it sees all")
    report = AdversaryReport(title="A federation", adversaries=("server",), claims=(claim,))
    (tmp_path / "report.json").write_text(json.dumps({**report.to_dict(), "federation": {}}))
    assert main(tmp_path, "--html", tmp_path / "page.html") == 0
    assert capsys.readouterr().out == f"{report}\n"
    assert (tmp_path / "page.html").read_text() == report.to_html()
    assert main(tmp_path, "--json") == 0
    assert AdversaryReport.from_json(capsys.readouterr().out) == report
    with pytest.raises(ParameterError, match="one run"):
        main(tmp_path, "--delta", "1e-6")


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (None, "There is no .*report.json"),
        ("{", "Not a privacy report"),
        ("\udcff", "cannot be read"),
        ('{"schema": "dpdl.ledger/3"}', "schema 'dpdl.ledger/3'"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(tmp_path: Path, written: str | None, says: str) -> None:
    if written is not None:
        (tmp_path / "report.json").write_bytes(written.encode("utf-8", "surrogateescape"))
    with pytest.raises(PrivacyError, match=says) as refusal:
        main(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("delta", ["0", "1", "-1", "nan"])
def test_a_delta_that_is_no_probability_is_refused(folder: Path, delta: str) -> None:
    with pytest.raises(ParameterError, match="delta"):
        main(folder, f"--delta={delta}")


@pytest.mark.parametrize(
    "training",
    [
        [],
        None,
        {"history": [{"step": 1}]},
        {"history": 3},
        {"history": [3]},
        {"history": None},
        {"history": [{"step": 10**400, "epsilon": 1, "test_accuracy": 0.5}]},
        {"history": [{"step": 1, "epsilon": 1, "test_accuracy": "nan"}]},
        {"history": [{"step": -5, "epsilon": 1, "test_accuracy": 1e300}]},
    ],
)
def test_a_damaged_history_is_refused(folder: Path, document: dict[str, Any], training: object) -> None:
    (folder / "report.json").write_text(json.dumps({**document, "training": training}))
    with pytest.raises(ParameterError, match="history"):
        main(folder, "--html", folder / "page.html")
    assert not (folder / "page.html").exists()


def test_a_page_that_cannot_be_written_is_said(folder: Path) -> None:
    with pytest.raises(PrivacyError, match="cannot be written"):
        main(folder, "--html", folder / "missing" / "page.html")
