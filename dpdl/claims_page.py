"""An adversary report as a web page of its own: one file without scripts, fonts or anything else from outside.

    Path("report.html").write_text(page(report), encoding="utf-8")

What is not guaranteed stands first, and again in its row: a reader who looks at nothing but the first screen has seen
it. It is told by words and signs as well as by colour. All texts are escaped, since names come from other parties, and
the page forbids itself to load or run anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from dpdl.privacy_report import rounded_up, shown_delta

if TYPE_CHECKING:
    from dpdl.claims import AdversaryReport, Claim

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f5; --card: #ffffff; --ink: #1a2421; --soft: #56635e; --line: #d8ded9;
  --good: #0b6e4f; --bad: #a3121c; --bad-ground: #fdeaea; --warn: #7a4b00; --warn-ground: #fff4df; }
@media (prefers-color-scheme: dark) { :root { --ground: #111614; --card: #19201d; --ink: #e7edea; --soft: #a3b0aa;
  --line: #313b36; --good: #6fd3ae; --bad: #ff9a9a; --bad-ground: #431418; --warn: #f2c372;
  --warn-ground: #35270c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p { margin: 0; }
ul, ol { margin: 0; padding-left: 1.5rem; }
.summary { color: var(--soft); margin-bottom: 1.5rem; }
.alarm { background: var(--bad-ground); border: 2px solid var(--bad); border-radius: .5rem; padding: .9rem 1.1rem;
  margin-bottom: 1.5rem; }
.alarm h2 { margin: 0 0 .3rem; color: var(--bad); }
table { width: 100%; border-collapse: separate; border-spacing: 0; background: var(--card); border-radius: .5rem;
  border: 1px solid var(--line); overflow: hidden; }
th, td { text-align: left; vertical-align: top; padding: .8rem .9rem; border-bottom: 1px solid var(--line); }
tbody:last-child tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-size: .85rem; font-weight: 600; }
tbody th { font-weight: 650; min-width: 8rem; border-right: 1px solid var(--line); }
.promise { min-width: 13rem; }
.promise strong { display: block; font-size: 1.1rem; white-space: nowrap; }
.promise span, .why p + p { color: var(--soft); font-size: .9rem; }
.why p + p { margin-top: .35rem; }
.kept .promise strong { color: var(--good); }
.none td { background: var(--bad-ground); }
.none .promise { border-left: .4rem solid var(--bad); }
.none .promise strong { color: var(--bad); font-weight: 800; letter-spacing: .04em; }
.open { background: var(--warn-ground); border-left: .4rem solid var(--warn); border-radius: .3rem;
  padding: .8rem 1.1rem; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .9rem; }
@media (max-width: 46rem) { thead { display: none; } table, tbody, tr, th, td { display: block; width: 100%; }
  tbody th { border-right: 0; background: var(--ground); } }
@media print { body { background: none; } .alarm, .none td { print-color-adjust: exact; } tr { break-inside: avoid; } }
""".strip()


def page(report: AdversaryReport) -> str:
    """A complete HTML document that says what the report says.

    Args:
        report: the claims, adversary by adversary.

    Returns:
        HTML in one piece, for a file in UTF-8: no link, no script, nothing that is loaded.
    """
    missing = [claim for claim in report.claims if not claim.guaranteed]
    title = escape(report.title)
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="summary">{_counted(len(report.claims) - len(missing), len(report.claims))}</p>',
        _alarm(missing),
        _table(report),
        *([] if not report.assumptions else ["<h2>Assumed</h2>", _list(report.assumptions, kind="ol")]),
        "<h2>Not covered by any of these</h2>",
        _open_points(report.not_covered),
        *([] if not report.notes else ["<h2>Notes</h2>", _list(report.notes)]),
        "<footer><p>Each epsilon is an upper bound, rounded up, on what that adversary can learn of that unit: "
        "the smaller, the less. Where assumptions do not hold, neither does the claim.</p></footer>",
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>\n{_STYLE}\n</style>",
            "</head>",
            "<body>",
            "<main>",
            *(part for part in parts if part),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _counted(kept: int, claims: int) -> str:
    if claims == 1:
        return "One claim, with a guarantee." if kept else "One claim, without a guarantee."
    return f"{claims} claims: {kept} with a guarantee, {claims - kept} without."


def _alarm(missing: Sequence[Claim]) -> str:
    """What is not promised, before everything else."""
    if not missing:
        return ""
    items = (f"<li>against {escape(claim.against)}: {escape(claim.unit)}</li>" for claim in missing)
    return f'<section class="alarm"><h2>✕ NO GUARANTEE</h2><ul>{"".join(items)}</ul></section>'


def _table(report: AdversaryReport) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Adversary", "Protected unit", "Promise", "Why"))
    bodies = (_rows(report, adversary) for adversary in report.adversaries)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n{chr(10).join(bodies)}\n</table>"


def _rows(report: AdversaryReport, adversary: str) -> str:
    """All claims against one adversary, its name beside them."""
    claims = report.against(adversary)
    name = f'<th scope="rowgroup" rowspan="{len(claims)}">{escape(adversary)}</th>'
    rows = (
        f'<tr class="{"kept" if claim.guaranteed else "none"}">{name if first else ""}<td>{escape(claim.unit)}</td>'
        f'<td class="promise">{_promise(claim)}</td><td class="why">{_reason(claim, report.numbers(claim))}</td></tr>'
        for first, claim in zip([True, *[False] * (len(claims) - 1)], claims, strict=True)
    )
    return f"<tbody>\n{chr(10).join(rows)}\n</tbody>"


def _promise(claim: Claim) -> str:
    if claim.epsilon is None or claim.delta is None:
        return "<strong>✕ NO GUARANTEE</strong>"
    relation = f"<br>{escape(claim.relation)}" if claim.relation else ""
    return (
        f"<strong>epsilon ≤ {rounded_up(claim.epsilon)}</strong>"
        f"<span>at delta = {shown_delta(claim.delta)}{relation}</span>"
    )


def _reason(claim: Claim, assumed: Sequence[int]) -> str:
    told = f"<p>assumes {', '.join(map(str, assumed))}</p>" if assumed and claim.guaranteed else ""
    return f"<p>{escape(claim.because)}</p>{told}"


def _open_points(not_covered: Sequence[str]) -> str:
    if not not_covered:
        return "<p>The report names nothing.</p>"
    return f'<div class="open">{_list(not_covered)}</div>'


def _list(texts: Iterable[str], *, kind: str = "ul") -> str:
    return f"<{kind}>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</{kind}>"
