"""A report as text, for terminals and logs: the claim first, then what it rests on and what it means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dpdl.audit.result import AuditResult
from dpdl.privacy_report import PrivacyReport, rounded_down, rounded_up, shown_delta
from dpdl.readings import Readings
from dpdl.releases import Release
from dpdl.report.comparison import compared
from dpdl.report.words import (
    ATTACKER,
    at_most,
    event_told,
    membership_told,
    protects_little,
    spent_told,
)

__all__ = ["report_text"]


def report_text(report: PrivacyReport, *, audits: Sequence[AuditResult] = (), deltas: Sequence[float] = ()) -> str:
    """All that a report claims, in lines.

    Args:
        report: the claim.
        audits: what attacks on this run, or on others of the same plan, found.
        deltas: at which epsilon is wanted besides the usual ones.

    Raises:
        ParameterError: a delta outside (0, 1).
    """
    read = report.readings(deltas=[*deltas, *(audit.delta for audit in audits if audit.delta > 0)])
    lines = [report.sentence, ""]
    beside = compared(audits, report, read)
    for each in beside:
        if each.alarms:
            lines += [f"{'CONTRADICTED' if each.contradicts else each.title}: {each.found}.", ""]
    if not report.secure_randomness:
        lines += ["INSECURE SEED: whoever knows it can remove the noise, and has no bound at all.", ""]
    lines += _section("notes", report.notes)
    lines += _section("facts", _facts(report))
    lines += _section("releases of this run", map(_release, report.releases)) if report.step is not None else []
    if report.dataset is not None:
        lines += _section(f"releases of all runs in {report.dataset.name}", map(_release, report.dataset.releases))
    lines += _meaning(read)
    lines += _section("audits", (f"{each.audit}. Beside this report: {each.verdict}" for each in beside))
    lines += _section("assumed", report.assumptions)
    return "\n".join(map(_plain, lines)).rstrip() + "\n"


def _facts(report: PrivacyReport) -> list[str]:
    bounds = f"epsilon between {rounded_down(report.epsilon_lower, 4)} and {rounded_up(report.epsilon, 4)}"
    facts = [
        f"{bounds} at delta = {shown_delta(report.delta)}",
        f"unit: {report.unit}; relation: {report.relation}",
        f"sampling: {report.sampling}; mechanism: {report.mechanism}",
        f"accountant: {report.accountant}",
        f"steps: {report.steps:,} of {report.planned_steps:,} planned",
        f"noise and sampling from {'keys that nobody knows' if report.secure_randomness else 'a known seed'}",
        "made with " + ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    ]
    if report.planned_epsilon is not None and report.steps < report.planned_steps:
        facts.insert(1, f"{at_most(report.planned_epsilon)} once all planned steps are taken")
    if report.dataset_epsilon is not None:
        facts.insert(1, f"{at_most(report.dataset_epsilon)} for all runs on the data together")
    return [
        *facts,
        *([f"made on {report.made}"] if report.made else []),
        *([f"run: {report.run}"] if report.run else []),
    ]


def _release(release: Release) -> str:
    of = f" of {release.run}" if release.run else ""
    return f"{release.count:,} x {release.label}{of}: {event_told(release.event)}"


def _meaning(read: Readings | None) -> list[str]:
    if read is None:
        return _section("meaning", ["the report is of schema 1, which lists no releases: no curves can be computed"])
    planned = any(row.planned != row.so_far for row in read.at_deltas)
    rows = []
    for row in read.at_deltas:
        told = f"delta {shown_delta(row.delta)}: {spent_told(row.so_far)}"
        told += f", all planned steps {spent_told(row.planned)}" if planned else ""
        rows.append(told + (f", all runs {spent_told(row.all_runs)}" if row.all_runs is not None else ""))
    lines = _section("epsilon at other deltas, at most", rows)
    for title, membership in (
        ("what an attacker can do with this run", read.membership),
        ("what an attacker can do with all runs on the data", read.dataset_membership),
    ):
        if membership is not None:
            little = (
                ["these bounds exclude next to nothing: epsilon is too large"] if protects_little(membership) else []
            )
            lines += _section(title, [*little, *membership_told(membership), ATTACKER])
    return lines


def _section(title: str, items: Iterable[str]) -> list[str]:
    lines = [f"  {item}" for item in items]
    return [f"{title}:", *lines, ""] if lines else []


def _plain(words: str) -> str:
    """On one line, so that no name can pass for another claim."""
    return words if words.isprintable() else repr(words)[1:-1]
