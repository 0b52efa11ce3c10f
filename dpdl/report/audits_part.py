"""The part of a report's page that tells what attacks found, each beside the report's own bound."""

from __future__ import annotations

from collections.abc import Sequence

from accountants import NeighboringRelation
from dpdl.audit.result import AuditResult, percent_down
from dpdl.audit.verdict import A_FAILURE_PROVES_NOTHING
from dpdl.html_page import table, text
from dpdl.privacy_report import figures_up, rounded_down, shown_delta
from dpdl.report.comparison import Comparison
from dpdl.report.words import at_most

__all__ = ["audits_part", "percent_told"]

HUGE_DIGITS = 18
HUGE = 10**HUGE_DIGITS  # a count beyond which nothing was counted


def audits_part(beside: Sequence[Comparison]) -> list[str]:
    """The section, or nothing without audits."""
    if not beside:
        return []
    rows = []
    for each in beside:
        audit = each.audit
        found = f"epsilon ≥ {rounded_down(audit.epsilon_lower)} at delta = {shown_delta(audit.delta)}"
        under = "" if audit.relation is None else f", {NeighboringRelation(audit.relation).phrase}"
        against = "–" if each.bound is None else at_most(each.bound).replace("<=", "≤")
        verdict = f"<strong>✕ {text(each.verdict)}</strong>" if each.alarms else text(each.verdict)
        rows.append(
            [
                text(audit.attack),
                f"{found}{under}, with confidence {percent_told(audit.confidence)}",
                against,
                verdict + _told(audit),
            ]
        )
    head = ["Attack", "Found at least", "This report's bound", "Verdict"]
    told = f'<p class="soft">{text(A_FAILURE_PROVES_NOTHING[0].upper() + A_FAILURE_PROVES_NOTHING[1:])}.</p>'
    return ["<h2>Audits</h2>", table("What attacks found", head, rows, kind="compact wide"), told]


def _told(audit: AuditResult) -> str:
    """What an audit counted and assumes, below its verdict."""
    counts = [
        f"{name.replace('_', ' ')} {_counted(name, value)}"
        for name, value in audit.details.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    lines = [" · ".join(counts)] if counts else []
    lines += [f"assumes: {'; '.join(audit.assumptions)}"] if audit.assumptions else []
    lines += audit.notes
    return "".join(f'<p class="soft">{text(line)}</p>' for line in lines)


def percent_told(share: float) -> str:
    """A confidence, rounded down: 0.95 is 95 %."""
    return percent_down(share).replace("%", " %")


def _counted(name: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < HUGE else f"a number of more than {HUGE_DIGITS} digits"
    return figures_up(value, 4) if name.endswith("at_most") else f"{value:.4g}"
