"""A privacy report as a web page of its own: one file that anybody can open, keep, print and publish.

    Path("report.html").write_text(report_page(optimizer.report(delta=1e-5)), encoding="utf-8")

The claim stands first; what weakens it stands above everything that explains it. Curves and bounds are computed by the
accountants from the releases that the report lists, when the page is made. Without a guarantee there are no curves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpdl.audit.result import AuditResult
from dpdl.html_page import bulleted, document, numbered, table, text
from dpdl.privacy_report import PrivacyReport, figures_up, percent_up, rounded_down, rounded_up, shown_delta
from dpdl.readings import Membership, Readings, StepPoint
from dpdl.releases import Release
from dpdl.report.audits_part import audits_part, percent_told
from dpdl.report.chart import Curve, Mark, line_chart
from dpdl.report.comparison import Comparison, compared
from dpdl.report.words import (
    ATTACKER,
    accuracy_told,
    advantage_told,
    at_most,
    event_told,
    false_alarms,
    one_in,
    percent,
    posterior_told,
    protects_little,
    rate_told,
    spent_told,
)
from dpdl.training import HistoryPoint

__all__ = ["report_page"]

TOLD_RATE = 0.01  # the false positive rate that is told in a sentence
STEP_ROWS = 6  # of the table beside the curve over the steps


def report_page(
    report: PrivacyReport,
    *,
    audits: Sequence[AuditResult] = (),
    history: Sequence[HistoryPoint] = (),
    deltas: Sequence[float] = (),
) -> str:
    """A complete HTML document that says what the report says, and what it means.

    Args:
        report: the claim.
        audits: what attacks on this run, or on others of the same plan, found. One that contradicts the claim stands
            above everything else.
        history: accuracy over the steps, if it may be published: it is not covered by the guarantee.
        deltas: at which epsilon is wanted besides the usual ones.

    Returns:
        HTML in one piece, for a file in UTF-8: no link, no script, nothing that is loaded.

    Raises:
        ParameterError: a delta outside (0, 1).
    """
    read = report.readings(deltas=[*deltas, *(audit.delta for audit in audits if audit.delta > 0)])
    beside = compared(audits, report, read)
    short = f"epsilon <= {rounded_up(report.epsilon)}" if report.guaranteed else "NO GUARANTEE"
    parts = [
        _head(report),
        *_alarms(report, beside, read),
        _notes(report.notes),
        "<h2>The claim</h2>",
        _facts(report),
        *([_unread()] if read is None else _meaning(report, read)),
        *_releases(report),
        *audits_part(beside),
        *_accuracy(history),
        "<h2>Assumed</h2>",
        '<p class="soft">Where one of these does not hold, neither does the claim.</p>',
        numbered(report.assumptions),
        _foot(report),
    ]
    return document(f"Privacy report: {short} at delta = {shown_delta(report.delta)}", parts)


# ── what stands first ───────────────────────────────────────────────────────────────────────────────


def _head(report: PrivacyReport) -> str:
    of = [f"run {text(report.run)}"] if report.run else []
    made = [f"made on {text(report.made)}"] if report.made else []
    over = " · ".join(["Privacy report", *of, *made])
    delta = f"<small>at delta = {shown_delta(report.delta)}</small>"
    claim = f"epsilon ≤ {rounded_up(report.epsilon)}" if report.guaranteed else "✕ NO GUARANTEE"
    kind = "claim" if report.guaranteed else "claim missing"
    return (
        f'<header><p class="over">{over}</p><h1 class="{kind}">{claim} {delta}</h1>'
        f'<p class="summary">{text(report.sentence)}</p></header>'
    )


def _alarms(report: PrivacyReport, beside: Sequence[Comparison], read: Readings | None) -> list[str]:
    alarms = []
    if not report.guaranteed:
        alarms.append(
            _alarm("NO GUARANTEE", "Epsilon is infinite at this delta: what was released may show any example. ")
        )
    for each in beside:
        if each.alarms:
            sure = f"with confidence {percent_told(each.audit.confidence)}"
            say = f"{each.found}, {sure}. The claim is wrong, or what the audit assumes."
            alarms.append(_alarm(each.title, say))
    if report.guaranteed and report.dataset_epsilon is not None and math.isinf(report.dataset_epsilon):
        say = "All runs on the data together have an infinite epsilon at this delta: what this run promises is not all."
        alarms.append(_alarm("NO GUARANTEE FOR ALL RUNS TOGETHER", say))
    if not report.secure_randomness:
        say = (
            "Noise and sampling came from insecure_seed: whoever knows or guesses the seed can remove the noise. "
            "Against them nothing on this page holds."
        )
        alarms.append(_alarm("INSECURE SEED", say))
    if read is not None and read.membership is not None and protects_little(read.membership):
        say = (
            "The bounds below exclude next to nothing. An epsilon this large promises little to those whose data it is "
            "about, though real attacks may do worse than the bounds."
        )
        alarms.append(f'<section class="open"><h2>⚠ This epsilon protects little</h2><p>{say}</p></section>')
    return alarms


def _alarm(title: str, words: str) -> str:
    return f'<section class="alarm"><h2>✕ {text(title)}</h2><p>{text(words)}</p></section>'


def _notes(notes: Sequence[str]) -> str:
    return f'<h2>To be read with it</h2><div class="open">{bulleted(notes)}</div>' if notes else ""


def _facts(report: PrivacyReport) -> str:
    delta = shown_delta(report.delta)
    lower = f"≥ {rounded_down(report.epsilon_lower, 4)} by the same accountant: the bound is tight up to that"
    rows = [("Epsilon", f"≤ {rounded_up(report.epsilon, 4)} at delta = {delta}; {lower}")]
    if not report.guaranteed:
        rows = [("Epsilon", f"infinite at delta = {delta}")]
    if report.planned_epsilon is not None and report.steps < report.planned_steps:
        rows.append(("All planned steps", f"{_at_most(report.planned_epsilon)} at delta = {delta}"))
    if report.dataset_epsilon is not None:
        rows.append(("All runs on the data", f"{_at_most(report.dataset_epsilon)} at delta = {delta}"))
    rows += [
        ("Protected unit", f"one {report.unit}"),
        ("Neighbours differ by", report.relation),
        ("Sampling", report.sampling),
        ("Mechanism", report.mechanism),
        ("Steps", f"{report.steps:,} of {report.planned_steps:,} planned"),
        ("Accountant", report.accountant),
        ("Randomness", "secure: keys that nobody knows" if report.secure_randomness else "INSECURE: a known seed"),
    ]
    dataset = report.dataset
    if dataset is not None:
        known = "" if dataset.id is None else f", id {dataset.id}"
        budget = "no budget" if dataset.budget is None else f"budget {_budget(*dataset.budget)}"
        rows.append(("Dataset's ledger", f"{dataset.name}{known}, {budget}{', adaptive' if dataset.adaptive else ''}"))
    cells = "\n".join(f'<tr><th scope="row">{name}</th><td>{text(value)}</td></tr>' for name, value in rows)
    caption = "<caption>What is promised, and by what</caption>"
    return f'<table class="wide compact">{caption}<tbody>\n{cells}\n</tbody></table>'


# ── what it means ───────────────────────────────────────────────────────────────────────────────────


def _unread() -> str:
    return (
        '<h2>What it means</h2><p class="soft">This report is of schema 1, which lists no releases: no curve can be '
        "computed from it.</p>"
    )


def _meaning(report: PrivacyReport, read: Readings) -> list[str]:
    parts = []
    if read.membership is not None:
        parts += ["<h2>What an attacker can do</h2>", _tiles(read.membership), _attackers(read)]
    if read.over_steps is not None:
        parts += ["<h2>Epsilon over the steps</h2>", _over_steps(report, read.over_steps)]
    return [*parts, "<h2>Epsilon at other deltas</h2>", _at_deltas(report, read)]


def _tiles(membership: Membership) -> str:
    """Three sentences, each with its number above it."""
    found = next(pair for pair in membership.true_positive_rates if pair[0] == TOLD_RATE)
    even = membership.posteriors[0]
    tiles = [
        (f"≤ {percent_up(found[1])} found", rate_told(*found)),
        (f"≤ {percent_up(membership.accuracy)} right", accuracy_told(membership)),
        (f"≤ {percent_up(even[1])} sure", posterior_told(*even, membership.failure)),
    ]
    told = "".join(f"<div><strong>{text(number)}</strong>{text(sentence)}</div>" for number, sentence in tiles)
    return f'<div class="tiles">{told}</div>'


def _attackers(read: Readings) -> str:
    assert read.membership is not None
    assert read.trade_off is not None
    own, of_all = read.membership, read.dataset_membership
    points = list(zip(read.trade_off.alpha, read.trade_off.beta, strict=True))
    worst = percent_up(own.advantage)
    chart = line_chart(
        name="trade-off",
        title="Trade-off curve: members missed against false alarms",
        description="No attack gets into the shaded region. The nearer the curve is to the dotted line, the less "
        f"anybody can do better than guessing: at most by {worst} of the cases, the advantage.",
        x="false alarms, share of non-members",
        y="members missed, share",
        curves=[
            Curve(points=points, kind="curve", name="the best attack misses at least", shaded=True),
            Curve(points=[(0, 1), (1, 0)], kind="guess", name="guessing without looking"),
        ],
        most=(1.0, 1.0),
    )
    columns = [own, *([] if of_all is None else [of_all])]
    heads = ["this run", "all runs on the data"] if of_all is not None else ["at most"]
    rates = [
        [text(false_alarms(rate)), *(percent_up(each.true_positive_rates[i][1]) for each in columns)]
        for i, (rate, _) in enumerate(own.true_positive_rates)
    ]
    beliefs = [
        [percent(before), *(percent_up(each.posteriors[i][1]) for each in columns)]
        for i, (before, _) in enumerate(own.posteriors)
    ]
    chance = one_in(own.failure)
    tables = [
        table("Members recognised, at most", ["who accepts", *heads], rates, kind="compact numbers"),
        table(
            f"Belief in membership, but for a chance of {chance}", ["before", *heads], beliefs, kind="compact numbers"
        ),
        f'<p class="soft">{text(advantage_told(own))} {ATTACKER}</p>',
    ]
    return f'<div class="pair">{chart}<div>{"".join(tables)}</div></div>'


def _over_steps(report: PrivacyReport, points: Sequence[StepPoint]) -> str:
    taken = [point for point in points if not point.planned]
    planned = [point for point in points if point.planned]
    now = taken[-1]
    curves = [Curve(points=[(point.step, point.epsilon) for point in taken], kind="curve", name="spent")]
    marks = [Mark(at=(now.step, now.epsilon), value=rounded_up(now.epsilon))]
    seen = f"Epsilon grows to {rounded_up(now.epsilon)} after {now.step:,} steps"
    if planned:
        ahead = [(point.step, point.epsilon) for point in (now, *planned)]
        curves.append(Curve(points=ahead, kind="planned", name="planned"))
        last = rounded_up(ahead[-1][1])
        marks.append(Mark(at=ahead[-1], value=last))
        seen += f", and to {last} if all {planned[-1].step:,} planned steps are taken"
    others = [release for release in report.releases if (release.event, release.run) != (report.step, "")]
    counted = " Other releases of the run are counted from the start." if others else ""
    delta = f"delta = {shown_delta(report.delta)}"
    chart = line_chart(
        name="steps",
        title="Epsilon over the steps",
        description=f"{seen}, at {delta}.{counted}",
        x="steps (noisy releases)",
        y=f"epsilon, upper bound at {delta}",
        curves=curves,
        marks=marks,
        most=None if points[-1].step else (1.0, 1.0),
    )
    every = max(1, (len(points) - 1) // STEP_ROWS)
    chosen = sorted({*range(0, len(points), every), len(points) - 1, len(taken) - 1})
    rows = [
        [
            f"{points[i].step:,}",
            rounded_up(points[i].epsilon),
            *(["planned" if points[i].planned else "spent"] if planned else []),
        ]
        for i in chosen
    ]
    head = ["steps", "epsilon", *(["which are"] if planned else [])]
    here = chosen.index(len(taken) - 1)
    numbers = table(f"Epsilon at {delta}, at most", head, rows, kind="compact numbers", marked=here)
    return f'<div class="pair">{chart}<div>{numbers}</div></div>'


def _at_deltas(report: PrivacyReport, read: Readings) -> str:
    planned = report.steps < report.planned_steps
    of_all = any(row.all_runs is not None for row in read.at_deltas)
    head = ["delta", "this run so far" if planned else "this run"]
    head += ["all planned steps"] * planned + ["all runs on the data"] * of_all
    rows = [
        [
            shown_delta(row.delta),
            spent_told(row.so_far),
            *([spent_told(row.planned)] if planned else []),
            *([spent_told(row.all_runs)] if of_all else []),
        ]
        for row in read.at_deltas
    ]
    if not any(math.isfinite(row.so_far) for row in read.at_deltas):
        return f"<p>There is no guarantee at any delta from {rows[0][0]} to {rows[-1][0]}.</p>"
    own = [row.delta for row in read.at_deltas].index(report.delta)
    told = (
        '<p class="soft">The same releases, stated at other deltas. A delta of 1/n or more, n the number of records, '
        "would allow one record to be published whole.</p>"
    )
    kind = "compact numbers" if len(head) > 2 else "compact numbers narrow"
    return table("Epsilon, at most", head, rows, kind=kind, marked=own) + told


# ── what was released, and what was tried ───────────────────────────────────────────────────────────


def _releases(report: PrivacyReport) -> list[str]:
    if report.step is None:
        return []
    head = ["What for", "How often", "How it is protected"]
    if report.releases:
        own = table("By this run", head, map(_release, report.releases), kind="compact wide")
    else:
        own = "<p>Nothing was released yet.</p>"
    parts = ["<h2>All releases</h2>", own]
    if report.dataset is not None:
        rows = [[_release(each)[0], text(_run(report, each)), *_release(each)[1:]] for each in report.dataset.releases]
        caption = f"By all runs in {report.dataset.name}"
        parts.append(table(caption, [head[0], "Run", *head[1:]], rows, kind="compact wide"))
    return parts


def _release(release: Release) -> list[str]:
    return [text(release.label), f"{release.count:,}", text(event_told(release.event))]


def _run(report: PrivacyReport, release: Release) -> str:
    name = release.run or "without a name"
    return f"{name} (this run)" if release.run and release.run == report.run else name


def _accuracy(history: Sequence[HistoryPoint]) -> list[str]:
    if not history:
        return []
    points = [(float(point.step), 100 * point.test_accuracy) for point in history]
    last = f"{points[-1][1]:.1f} %"
    chart = line_chart(
        name="accuracy",
        title="Test accuracy over the steps",
        description=f"Test accuracy ends at {last} after {history[-1].step:,} steps. It is published without noise, "
        "and test examples are not covered by the guarantee.",
        x="steps (noisy releases)",
        y="test accuracy, %",
        curves=[Curve(points=points, kind="curve", name="test accuracy")],
        marks=[Mark(at=points[-1], value=last)],
        most=(max(points[-1][0], 1.0), 100.0),
    )
    return ["<h2>Accuracy</h2>", f'<div class="pair">{chart}</div>']


def _foot(report: PrivacyReport) -> str:
    made = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        f"<footer><p>Made with {text(made)}.</p><p>Every epsilon, rate and belief is an upper bound, rounded up; every "
        "lower bound is rounded down. The page holds no script and loads nothing. It says what its maker claims: only "
        "the code that ran, and the ledger, can prove it.</p></footer>"
    )


def _at_most(epsilon: float) -> str:
    return at_most(epsilon).replace("<=", "≤")


def _budget(epsilon: float, delta: float) -> str:
    return f"epsilon {figures_up(epsilon)} at delta {shown_delta(delta)}"
