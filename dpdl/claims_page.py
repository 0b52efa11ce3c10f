"""An adversary report as a web page of its own: one file without scripts, fonts or anything else from outside.

    Path("report.html").write_text(page(report), encoding="utf-8")

What is not guaranteed stands first, and again in its row: a reader who looks at nothing but the first screen has seen
it. It is told by words and signs as well as by colour. All texts are escaped, since names come from other parties, and
the page forbids itself to load or run anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpdl.html_page import bulleted, document, numbered, text
from dpdl.privacy_report import rounded_up, shown_delta

if TYPE_CHECKING:
    from dpdl.claims import AdversaryReport, Claim

__all__ = ["page"]


def page(report: AdversaryReport) -> str:
    """A complete HTML document that says what the report says.

    Args:
        report: the claims, adversary by adversary.

    Returns:
        HTML in one piece, for a file in UTF-8: no link, no script, nothing that is loaded.
    """
    missing = [claim for claim in report.claims if not claim.guaranteed]
    title = text(report.title)
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="summary">{_counted(len(report.claims) - len(missing), len(report.claims))}</p>',
        _alarm(missing),
        _table(report),
        *([] if not report.assumptions else ["<h2>Assumed</h2>", numbered(report.assumptions)]),
        "<h2>Not covered by any of these</h2>",
        _open_points(report.not_covered),
        *([] if not report.notes else ["<h2>Notes</h2>", bulleted(report.notes)]),
        "<footer><p>Each epsilon is an upper bound, rounded up, on what that adversary can learn of that unit: "
        "the smaller, the less. Where assumptions do not hold, neither does the claim.</p></footer>",
    ]
    return document(report.title, parts)


def _counted(kept: int, claims: int) -> str:
    if claims == 1:
        return "One claim, with a guarantee." if kept else "One claim, without a guarantee."
    return f"{claims} claims: {kept} with a guarantee, {claims - kept} without."


def _alarm(missing: Sequence[Claim]) -> str:
    """What is not promised, before everything else."""
    if not missing:
        return ""
    items = (f"<li>against {text(claim.against)}: {text(claim.unit)}</li>" for claim in missing)
    return f'<section class="alarm"><h2>✕ NO GUARANTEE</h2><ul>{"".join(items)}</ul></section>'


def _table(report: AdversaryReport) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Adversary", "Protected unit", "Promise", "Why"))
    bodies = (_rows(report, adversary) for adversary in report.adversaries)
    return f'<table class="wide">\n<thead><tr>{head}</tr></thead>\n{chr(10).join(bodies)}\n</table>'


def _rows(report: AdversaryReport, adversary: str) -> str:
    """All claims against one adversary, its name beside them."""
    claims = report.against(adversary)
    name = f'<th scope="rowgroup" rowspan="{len(claims)}">{text(adversary)}</th>'
    rows = (
        f'<tr class="{"kept" if claim.guaranteed else "none"}">{name if first else ""}<td>{text(claim.unit)}</td>'
        f'<td class="promise">{_promise(claim)}</td><td class="why">{_reason(claim, report.numbers(claim))}</td></tr>'
        for first, claim in zip([True, *[False] * (len(claims) - 1)], claims, strict=True)
    )
    return f"<tbody>\n{chr(10).join(rows)}\n</tbody>"


def _promise(claim: Claim) -> str:
    if claim.epsilon is None or claim.delta is None:
        return "<strong>✕ NO GUARANTEE</strong>"
    relation = f"<br>{text(claim.relation)}" if claim.relation else ""
    return (
        f"<strong>epsilon ≤ {rounded_up(claim.epsilon)}</strong>"
        f"<span>at delta = {shown_delta(claim.delta)}{relation}</span>"
    )


def _reason(claim: Claim, assumed: Sequence[int]) -> str:
    told = f"<p>assumes {', '.join(map(str, assumed))}</p>" if assumed and claim.guaranteed else ""
    return f"<p>{text(claim.because)}</p>{told}"


def _open_points(not_covered: Sequence[str]) -> str:
    if not not_covered:
        return "<p>The report names nothing.</p>"
    return f'<div class="open">{bulleted(not_covered)}</div>'
