"""`dpdl report`: what a report says, as text, as JSON, or as a page to publish."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpdl.audit.result import AuditResult
from dpdl.claims import AdversaryReport
from dpdl.errors import DataError, ParameterError
from dpdl.privacy_report import PrivacyReport
from dpdl.report.comparison import compared
from dpdl.report.page import report_page
from dpdl.report.text import report_text
from dpdl.training import REPORT, HistoryPoint

__all__ = ["register"]

EXIT_CONTRADICTED = 1
MOST_STEPS = 10**15
AUDIT_RUN = "dpdl.audit-run/1"  # of dpdl audit --json
CLAIMS = "dpdl.claims/"  # a report by adversary, of a federation or a split network

EXAMPLES = """examples:
  dpdl report dpdl-run                              the claim and what it means, as text
  dpdl report dpdl-run --html page.html             a page of its own, to publish
  dpdl report dpdl-run --delta 1e-6                 with epsilon at another delta
  dpdl report dpdl-run/report.json --json           the report, read and checked
  dpdl audit dpdl-run --split random --json > audit.json
  dpdl report dpdl-run --audit audit.json           with what an attack found; exit code 1 if that contradicts it
"""


def register(subparsers: Any) -> None:
    """Add the command to an argparse parser's subparsers."""
    parser = subparsers.add_parser(
        "report",
        help="show what a run may claim",
        description="Read a run's report, check it, and show what it claims and what that means. Exit code 0; 1 if an "
        "audit contradicts the claim; 2 if the report is missing, damaged or contradicts itself.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run_or_report", metavar="RUN", nargs="?", type=Path, default=Path("dpdl-run"), help=f"the folder of a run, or "
        f"its {REPORT} (default: %(default)s)")  # fmt: skip
    add("--html", metavar="PAGE", type=Path, help="write a page of its own there")
    add("--json", action="store_true", help="print the report as JSON instead of text")
    add("--delta", metavar="D", type=float, action="append", default=[], help="also give epsilon at this delta")
    add("--audit", metavar="FILE", type=Path, action="append", default=[], help="JSON of an audit to show with it")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command; the exit code."""
    text = _read(arguments.run_or_report / REPORT if arguments.run_or_report.is_dir() else arguments.run_or_report)
    if _schema(text).startswith(CLAIMS):
        return _by_adversary(AdversaryReport.from_json(text), arguments)
    report, document = PrivacyReport.from_json(text), json.loads(text)
    audits = [*_embedded(document), *(_audit(path) for path in arguments.audit)]
    deltas: list[float] = arguments.delta
    if deltas and report.step is None:
        raise ParameterError("--delta needs the releases, which a report of schema 1 does not list. Leave it out.")
    if arguments.html is not None:
        _write(arguments.html, report_page(report, audits=audits, history=_history(document), deltas=deltas))
    if arguments.json:
        values = report.to_dict(deltas=deltas)
        values |= {"training": document["training"]} if "training" in document else {}
        values |= {"audits": [audit.to_dict() for audit in audits]} if audits else {}
        sys.stdout.write(json.dumps(values, indent=2, allow_nan=False) + "\n")
    else:
        sys.stdout.write(report_text(report, audits=audits, deltas=deltas))
    read = report.readings(deltas=[audit.delta for audit in audits if audit.delta > 0]) if audits else None
    return EXIT_CONTRADICTED if any(each.alarms for each in compared(audits, report, read)) else 0


def _by_adversary(report: AdversaryReport, arguments: argparse.Namespace) -> int:
    if arguments.delta or arguments.audit:
        raise ParameterError("--delta and --audit are for reports of one run; this one has a claim for each adversary.")
    if arguments.html is not None:
        _write(arguments.html, report.to_html())
    sys.stdout.write((report.to_json() if arguments.json else str(report)) + "\n")
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"There is no {path}. Give the folder of a run, or the {REPORT} in it.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Give the {REPORT} of a run.") from error


def _write(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"The page cannot be written to {path}: {error}. Give another path.") from error
    sys.stderr.write(f"Written to {path}\n")


def _schema(text: str) -> str:
    """What a document calls itself; "" if it does not, which its reader then refuses."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    schema = document.get("schema") if isinstance(document, dict) else None
    return schema if isinstance(schema, str) else ""


def _embedded(document: dict[str, Any]) -> list[AuditResult]:
    audits = document.get("audits", [])
    if not isinstance(audits, list):
        raise ParameterError(f"audits of a report are a list, got {audits!r}.")
    return [AuditResult.from_dict(values) for values in audits]


def _audit(path: Path) -> AuditResult:
    """What `AuditResult.to_json` wrote, or `dpdl audit --json`, which has it beside other things."""
    text = _read(path)
    if _schema(text) == AUDIT_RUN:
        values = json.loads(text).get("audit")
        if values is None:
            raise ParameterError(f"{path} has no bound on epsilon to compare: `dpdl audit` said why. Leave it out.")
        return AuditResult.from_dict(values)
    return AuditResult.from_json(text)


def _history(document: dict[str, Any]) -> Sequence[HistoryPoint]:
    """Accuracy over the steps, as `dpdl train` adds it."""
    training = document.get("training", {})
    try:
        points = [
            HistoryPoint(
                step=int(point["step"]), epsilon=float(point["epsilon"]), test_accuracy=float(point["test_accuracy"])
            )
            for point in training.get("history", [])
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ParameterError(f"The training history in the report cannot be read: {error!r}.") from error
    for point in points:
        if not (0 <= point.step <= MOST_STEPS and 0 <= point.test_accuracy <= 1):
            raise ParameterError(
                f"The training history in the report cannot be read: accuracy {point.test_accuracy} at step "
                f"{point.step if abs(point.step) <= MOST_STEPS else 'beyond all'}."
            )
    return points
