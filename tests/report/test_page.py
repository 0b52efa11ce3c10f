"""The page: what a reader is told, that it is what the accountants say, and that nothing can be smuggled in."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from fractions import Fraction

import pytest

import accountants
from accountants import EpsilonDelta, Gaussian, PoissonSampled
from dpdl import Budget, Ledger, PrivacyReport
from dpdl.audit.result import AuditResult
from dpdl.claims import AdversaryReport, Claim
from dpdl.privacy_report import percent_up
from dpdl.report import report_page, report_text
from dpdl.report.comparison import Comparison, compared
from dpdl.report.words import event_told
from dpdl.training import HistoryPoint
from tests.report.made import DELTA, STEP, STEPS, a_report
from tests.report.reading import Read

ADD_OR_REMOVE = accountants.NeighboringRelation.ADD_OR_REMOVE
AUDIT = AuditResult(
    attack="one run, white box",
    epsilon_lower=1.25,
    delta=DELTA,
    relation="add_or_remove",
    confidence=0.95,
    claimed_epsilon=3.3,
    details={"canaries": 1000, "right": 143, "auc": 0.71234, "kind": "dirac"},
    assumptions=("canaries are independent",),
    notes=("finds half of the noise missing",),
)
HISTORY = tuple(HistoryPoint(step=step, epsilon=1.0, test_accuracy=step / 600) for step in range(0, 481, 60))


@functools.cache
def made(kind: str) -> PrivacyReport:
    if kind == "in a ledger":
        ledger = Ledger(relation=ADD_OR_REMOVE)
        ledger.record(Gaussian(30.0), label="count of smokers", run="statistics")
        return a_report(account=ledger, other=Gaussian(20.0), taken=200)
    changes = {
        "whole": {},
        "half": {"taken": 200},
        "nothing yet": {"taken": 0},
        "no noise": {"noise_multiplier": 0.0, "taken": 100},
        "insecure": {"secure": False, "noise_multiplier": 1.0},
        "large": {"noise_multiplier": 0.5},
    }[kind]
    return a_report(**changes)  # type: ignore[arg-type]


@functools.cache
def page(kind: str) -> Read:
    return Read(report_page(made(kind)))


KINDS = ("whole", "half", "nothing yet", "no noise", "insecure", "large", "in a ledger")


def least_above(exact: float, shown: str, digits: int, unit: int = 1) -> None:
    """The number shown is the least of that many digits that is not below the exact one."""
    value, true = Fraction(shown), Fraction(exact) * unit
    assert true <= value < true + Fraction(1, 10**digits), (exact, shown)


# ── form ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_well_formed_and_stands_alone(kind: str) -> None:
    reader = page(kind)
    names = {tag for tag, _ in reader.tags}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form", "a", "video", "use"})
    for _, held in reader.tags:
        assert not any(
            name.startswith("on") or name in {"href", "src", "srcset", "style", "xlink:href"} for name in held
        )
    for outside in ("url(", "@import", "http:", "https:", "//"):
        assert outside not in reader.html
    assert [held.get("content") for held in reader.attributes("meta") if held.get("http-equiv")] == [
        "default-src 'none'; style-src 'unsafe-inline'"
    ]
    assert len(reader.seen("head", "title")) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_tables_and_drawings_can_be_read_without_eyes(kind: str) -> None:
    reader = page(kind)
    assert [held.get("lang") for held in reader.attributes("html")] == ["en"]
    assert len(reader.attributes("h1")) == 1
    assert len(reader.attributes("table")) == len(reader.attributes("caption"))
    assert all(held.get("scope") in {"row", "col"} for held in reader.attributes("th"))
    ids = [held["id"] for _, held in reader.tags if "id" in held]
    assert len(ids) == len(set(ids))
    drawings = [held for held in reader.attributes("svg") if held.get("aria-hidden") != "true"]
    assert all(held.get("role") == "img" for held in drawings)
    for held in drawings:
        assert set(str(held["aria-labelledby"]).split()) <= set(ids)
    assert len(reader.seen("svg", "title")) == len(reader.seen("svg", "desc")) == len(drawings)


def test_coordinates_are_numbers_within_the_drawing() -> None:
    for kind in ("whole", "half", "nothing yet", "large"):
        for held in page(kind).attributes("path"):
            numbers = [float(each) for each in re.findall(r"-?[\d.]+", str(held["d"]))]
            assert numbers
            assert all(math.isfinite(each) and 0 <= each <= 440 for each in numbers), held


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_claim_stands_first_rounded_up() -> None:
    reader = page("half")
    exact = accountants.PRVAccountant().compose(STEP, 200).epsilon(DELTA)
    found = re.fullmatch(r"epsilon ≤ (\d+\.\d\d)", reader.seen("h1")[0])
    assert found is not None
    least_above(exact, found[1], 2)
    assert "at delta = 1e-05" in reader.seen("h1")
    assert made("half").sentence in reader.words


def test_epsilon_at_each_delta_is_the_accountants_rounded_up() -> None:
    reader = page("half")
    rows = {row[0]: row[1:] for row in reader.rows() if re.fullmatch(r"0\.0+1|1e-\d\d", row[0])}
    assert set(rows) == {"0.001", "0.0001", "1e-05", "1e-06", "1e-07", "1e-08", "1e-09"}
    for delta, (so_far, planned) in rows.items():
        for shown, steps in ((so_far, 200), (planned, STEPS)):
            least_above(accountants.PRVAccountant().compose(STEP, steps).epsilon(float(delta)), shown, 2)


def test_what_attackers_can_do_is_the_accountants_rounded_up() -> None:
    event = 200 * STEP
    rows = {row[0]: row[1] for row in page("half").rows() if len(row) == 2}
    for false, told in (
        (1e-3, "1 false alarm in 1,000"),
        (1e-2, "1 false alarm in 100"),
        (1e-1, "1 false alarm in 10"),
    ):
        (exact,) = accountants.tpr_at_fpr(event, [false])
        least_above(float(exact), rows[told].removesuffix(" %"), 1, 100)
    for prior, told in ((0.5, "50 %"), (0.1, "10 %"), (0.01, "1 %")):
        exact = accountants.posterior(event, prior, failure=1e-3)
        least_above(exact, rows[told].removesuffix(" %"), 1, 100)
    words = page("half").words
    right = re.search(r"≤ ([\d.]+) % right", words)
    gap = re.search(r"by more than ([\d.]+) % of the cases: the advantage", words)
    assert right is not None
    assert gap is not None
    least_above(accountants.bayes_accuracy(event, 0.5), right[1], 1, 100)
    least_above(accountants.advantage(event), gap[1], 1, 100)


def test_the_curve_over_the_steps_is_told_in_numbers_too() -> None:
    rows = [row for row in page("half").rows() if row[-1] in ("spent", "planned")]
    assert {row[-1] for row in rows} == {"spent", "planned"}
    assert [row[0] for row in rows if row[-1] == "spent"][-1] == "200"
    assert rows[-1][0] == "480"
    for step, epsilon, kind in rows:
        least_above(accountants.PRVAccountant().compose(STEP, int(step)).epsilon(DELTA), epsilon, 2)
        assert (kind == "planned") == (int(step) > 200)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.29, 0.5755, 0.999, 0.9999, 1.0, 1 / 3])
def test_a_share_is_never_shown_smaller_than_it_is(share: float) -> None:
    least_above(share, percent_up(share).removesuffix(" %"), 1, 100)


def test_every_release_is_listed() -> None:
    rows = page("in a ledger").rows()
    noise = "Gaussian noise of {} times the sensitivity"
    step = noise.format(2) + ", on a Poisson sample at rate 0.064"
    assert ["mean of the ages", "1", noise.format(20)] in rows
    assert ["step", "200", step] in rows
    assert ["count of smokers", "statistics", "1", noise.format(30)] in rows
    assert ["step", "digits 3f2a (this run)", "200", step] in rows
    (all_runs,) = [row for row in rows if row[0] == "All runs on the data"]
    exact = accountants.PRVAccountant().compose(Gaussian(30.0)).compose(Gaussian(20.0)).compose(STEP, 200)
    found = re.search(r"epsilon ≤ ([\d.]+) at", all_runs[1])
    assert found is not None
    assert float(found[1]) == pytest.approx(exact.epsilon(DELTA), abs=0.011)


# ── what must not be overlooked ─────────────────────────────────────────────────────────────────────


def test_without_a_guarantee_the_page_says_so_first_and_draws_nothing() -> None:
    reader = page("no noise")
    assert reader.seen("h1")[0] == "✕ NO GUARANTEE"
    assert "✕ NO GUARANTEE" in reader.seen("section")
    assert reader.seen("head", "title") == ["Privacy report: NO GUARANTEE at delta = 1e-05"]
    assert reader.attributes("svg") == []
    assert "epsilon ≤" not in reader.words
    assert "What an attacker can do" not in reader.words
    assert "There is no guarantee at any delta from 0.001 to 1e-09." in reader.words
    assert "the exact answer, without noise" in reader.words


def test_a_guarantee_at_larger_deltas_only_is_shown_as_such() -> None:
    report = a_report(other=EpsilonDelta(1.0, 2e-4), taken=0)  # type: ignore[arg-type]
    reader = Read(report_page(report))
    assert reader.seen("h1")[0] == "✕ NO GUARANTEE"
    assert reader.attributes("svg") == []
    rows = {row[0]: row[1] for row in reader.rows() if len(row) > 1}
    assert rows["0.001"] != "no guarantee"
    assert rows["1e-05"] == "no guarantee"


def test_an_infinite_epsilon_of_all_runs_together_is_an_alarm() -> None:
    ledger = Ledger(relation=ADD_OR_REMOVE)
    ledger.record(Gaussian(0.0), label="the plain mean", run="careless")
    reader = Read(report_page(a_report(account=ledger)))
    assert "✕ NO GUARANTEE FOR ALL RUNS TOGETHER" in reader.seen("section")
    assert reader.seen("h1")[0].startswith("epsilon ≤ ")


def test_an_insecure_seed_is_an_alarm() -> None:
    assert "✕ INSECURE SEED" in page("insecure").seen("section")
    assert not any("INSECURE" in words for words in page("whole").seen("body"))
    assert "INSECURE SEED" in report_text(made("insecure"))


def test_an_epsilon_that_excludes_next_to_nothing_is_called_so() -> None:
    assert "⚠ This epsilon protects little" in page("large").seen("section")
    assert "⚠ This epsilon protects little" not in page("whole").seen("section")


def test_an_audit_is_shown_with_what_it_counted_and_that_failing_proves_nothing() -> None:
    reader = Read(report_page(made("whole"), audits=[AUDIT]))
    (row,) = [row for row in reader.rows() if row[0] == AUDIT.attack]
    assert row[1] == "epsilon ≥ 1.25 at delta = 1e-05, adding or removing one example, with confidence 95 %"
    least_above(made("whole").epsilon, row[2].removeprefix("epsilon ≤ "), 2)
    assert row[3].startswith("no contradiction")
    for words in ("canaries 1,000 · right 143 · auc 0.7123", *AUDIT.assumptions, *AUDIT.notes):
        assert words in row[3]
    assert "An attack that fails proves nothing" in reader.words
    assert "CONTRADICTED" not in reader.words


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epsilon_lower": 9.0}, "above this report's 3.27"),
        ({"epsilon_lower": 9.0, "claimed_epsilon": None}, "above this report's 3.27"),
        ({"epsilon_lower": 4.0, "claimed_epsilon": 50.0, "delta": 1e-4}, "above this report's 2.80"),
        ({"epsilon_lower": 9.0, "relation": "zero_out"}, "zeroing out one example, above this report's 3.27"),
        ({"epsilon_lower": 9.0, "relation": "replace_one"}, "replacing one example, above this report's 6.49"),
    ],
)
def test_an_audit_that_contradicts_the_claim_stands_above_everything(changes: dict[str, float], says: str) -> None:
    audit = dataclasses.replace(AUDIT, **changes)  # type: ignore[arg-type]
    reader = Read(report_page(made("whole"), audits=[audit]))
    words = reader.seen("body")
    assert words.index("✕ THE CLAIM IS CONTRADICTED") < words.index("The claim")
    assert says in reader.words
    assert "✕ contradicts the claim" in reader.seen("table", "strong")
    assert f"CONTRADICTED: {AUDIT.attack} found" in report_text(made("whole"), audits=[audit])


def beside(report: PrivacyReport, **changes: object) -> tuple[Comparison, Read]:
    """An audit of another kind, compared, and the page that shows it."""
    audit = dataclasses.replace(AUDIT, **changes)  # type: ignore[arg-type]
    (found,) = compared([audit], report, report.readings(deltas=[audit.delta] if audit.delta else []))
    return found, Read(report_page(report, audits=[audit]))


def test_an_audit_under_another_relation_is_held_against_the_bound_for_that_relation() -> None:
    """Replacing one example moves the sum by two clip norms: what is true of it is above what adding one allows."""
    exact = accountants.PRVAccountant(relation="replace_one").compose(STEP, STEPS).epsilon(DELTA)
    true = {"epsilon_lower": 0.99 * exact, "relation": "replace_one", "claimed_epsilon": exact}
    assert 0.99 * exact > 1.9 * made("whole").epsilon
    for kind in ("whole", "half"):  # all planned steps are counted
        found, reader = beside(made(kind), **true)
        assert found.bound == exact
        assert not found.alarms
        assert "CONTRADICTED" not in reader.words
        (row,) = [row for row in reader.rows() if row[0] == AUDIT.attack]
        assert row[1].endswith("replacing one example, with confidence 95 %")
        least_above(exact, row[2].removeprefix("epsilon ≤ "), 2)
        assert row[3].startswith("no contradiction")
    found, reader = beside(made("whole"), **{**true, "epsilon_lower": 1.01 * exact})
    assert found.contradicts
    assert "✕ THE CLAIM IS CONTRADICTED" in reader.seen("body")


@pytest.mark.parametrize("case", ["unknown relation", "delta 0", "schema 1", "another's guarantee"])
def test_where_no_bound_is_known_nothing_is_compared_and_the_page_says_why(case: str) -> None:
    cases: dict[str, tuple[PrivacyReport, dict[str, object], str]] = {
        "unknown relation": (made("whole"), {"relation": None}, "does not say what neighbours differ in"),
        "delta 0": (made("whole"), {"delta": 0.0}, "promises nothing at delta = 0"),
        "schema 1": (
            dataclasses.replace(made("whole"), step=None, releases=()),
            {"relation": "replace_one"},
            "lists no releases",
        ),
        "another's guarantee": (
            a_report(other=EpsilonDelta(1.0, 1e-7)),  # type: ignore[arg-type]
            {"relation": "replace_one"},
            "about adding or removing one example",
        ),
    }
    report, changes, says = cases[case]
    found, reader = beside(report, epsilon_lower=30.0, claimed_epsilon=40.0, **changes)
    assert (found.bound, found.alarms) == (None, False)
    assert "CONTRADICTED" not in reader.words
    (row,) = [row for row in reader.rows() if row[0] == AUDIT.attack]
    assert row[2] == "–"
    assert row[3].startswith("not compared: ")
    assert says in row[3]
    assert "no contradiction" not in row[3]
    assert says in report_text(report, audits=[found.audit])


def test_an_audit_that_contradicts_another_claim_only_does_not_contradict_this_one() -> None:
    found, reader = beside(made("whole"), epsilon_lower=1.25, claimed_epsilon=1.0)
    assert (found.contradicts, found.alarms) == (False, True)
    assert "THE CLAIM IS CONTRADICTED" not in reader.words
    assert "✕ AN AUDIT CONTRADICTS THE CLAIM THAT IT WAS HELD AGAINST" in reader.seen("body")
    assert "this report's bound is not passed" in reader.words
    refuted, reader = beside(made("whole"), epsilon_lower=3.2, claimed_epsilon=3.3, claim_refuted=True)
    assert refuted.alarms
    assert "refuted the curve of its own claim of 3.30" in reader.words


def test_bounds_in_few_figures_are_rounded_to_the_safe_side() -> None:
    above, below = 0.0640000001, 1.000006
    assert event_told(PoissonSampled(above, Gaussian(below))) == (
        "Gaussian noise of 1 times the sensitivity, on a Poisson sample at rate 0.0640001"
    )
    assert event_told(EpsilonDelta(below, 1.0000001e-6)) == "a mechanism with epsilon 1.00001 at delta 1.00001e-06"
    assert event_told(Gaussian(0.3)) == "Gaussian noise of 0.3 times the sensitivity"
    ledger = Ledger(relation=ADD_OR_REMOVE, budget=Budget(epsilon=30.000001, delta=1e-5))
    assert "budget epsilon 30.0001 at delta 1e-05" in Read(report_page(a_report(account=ledger))).words
    almost = dataclasses.replace(AUDIT, confidence=1 - 1e-13)
    words = Read(report_page(made("whole"), audits=[almost])).words
    assert "with confidence 99.99 %" in words


def test_an_audit_of_the_whole_plan_is_held_against_the_whole_plan() -> None:
    audit = dataclasses.replace(AUDIT, epsilon_lower=3.0)  # above what 200 steps spend, below what 480 do
    assert made("half").epsilon < 3.0
    assert "CONTRADICTED" not in Read(report_page(made("half"), audits=[audit])).words


def test_accuracy_is_shown_as_not_covered() -> None:
    reader = Read(report_page(made("whole"), history=HISTORY))
    assert "Test accuracy over the steps" in reader.seen("svg", "title")
    assert "test examples are not covered by the guarantee" in reader.words
    assert "Accuracy" not in page("whole").seen("h2")


def test_a_report_of_schema_1_has_a_page_without_curves() -> None:
    old = dataclasses.replace(made("whole"), step=None, releases=(), made=None, run="")
    reader = Read(report_page(old, audits=[AUDIT]))
    assert reader.attributes("svg") == []
    assert "lists no releases" in reader.words
    assert "lists no releases" in report_text(old)


# ── texts of others ─────────────────────────────────────────────────────────────────────────────────

EVIL = "<img src=x onerror=alert(1)>\"'&</td></style><script>alert(2)</script>"
HIDDEN = "step\u202e\nNO ALARM"


@pytest.mark.parametrize("text", [EVIL, HIDDEN])
def test_names_of_others_cannot_become_markup_or_lines(text: str) -> None:
    ledger = Ledger(relation=ADD_OR_REMOVE)
    ledger.record(Gaussian(30.0), label=text, run=text)
    report = a_report(other=Gaussian(20.0), label=text, run=text, notes=(text,), account=ledger)
    report = dataclasses.replace(report, unit=text, sampling=text, mechanism=text, versions={text: text}, made=text)
    assert report.dataset is not None
    report = dataclasses.replace(report, dataset=dataclasses.replace(report.dataset, name=text, id=text))
    report = dataclasses.replace(report, assumptions=(text,), accountant=text)
    audit = dataclasses.replace(AUDIT, attack=text, assumptions=(text,), notes=(text,), details={text: 3})
    reader = Read(report_page(report, audits=[audit]))
    assert {tag for tag, _ in reader.tags}.isdisjoint({"img", "script"})
    assert "\u202e" not in reader.html
    shown = text if text.isprintable() else repr(text)[1:-1]
    assert reader.words.count(shown) >= 12
    assert "\u202e" not in report_text(report, audits=[audit])
    assert "\nNO ALARM" not in report_text(report, audits=[audit])


def test_both_kinds_of_page_share_one_style_sheet() -> None:
    claim = Claim(against="server", unit="record", because="it sees all")
    other = AdversaryReport(title="A federation", adversaries=("server",), claims=(claim,)).to_html()
    sheets = [re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL) for html in (other, page("whole").html)]
    assert sheets[0] == sheets[1]
    assert len(sheets[0]) == 1
    for needed in ("prefers-color-scheme: dark", "@media print", "@media (max-width"):
        assert needed in sheets[0][0]
