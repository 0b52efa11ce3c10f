"""Claims by adversary: what may be said, that nothing is left out, and the page that shows it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from dpdl.claims import AdversaryReport, Claim
from dpdl.errors import ParameterError

KEPT = Claim(
    against="model consumers",
    unit="record",
    because="DP-SGD at each client",
    epsilon=1.2345,
    delta=1e-5,
    relation="adding or removing one example",
    assumes=("records are disjoint",),
)
MISSING = Claim(against="server", unit="client", because="it receives each client's update")
REPORT = AdversaryReport(
    title="A federation",
    adversaries=("server", "model consumers"),
    claims=(KEPT, MISSING),
    not_covered=("timing", "number of records"),
    notes=("two rounds",),
)


def a_claim(**changes: Any) -> Claim:
    return dataclasses.replace(KEPT, **changes)


# ── claims ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_claim_says_its_bound_rounded_up_and_what_it_rests_on() -> None:
    assert str(KEPT) == (
        "against model consumers, record: epsilon <= 1.24 at delta = 1e-05, adding or removing one example "
        "(DP-SGD at each client; assumes: records are disjoint)"
    )


@pytest.mark.parametrize("epsilon", [None, math.inf])
def test_without_a_finite_epsilon_there_is_no_guarantee(epsilon: float | None) -> None:
    claim = a_claim(epsilon=epsilon)
    assert not claim.guaranteed
    assert claim.epsilon is None
    assert "NO GUARANTEE" in str(claim)
    assert "epsilon <=" not in str(claim)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epsilon": -0.1}, "epsilon of the claim against model consumers must be >= 0"),
        ({"epsilon": -math.inf}, "must be >= 0"),
        ({"epsilon": math.nan}, "must be >= 0"),
        ({"epsilon": "1.0"}, "epsilon of the claim against model consumers must be a number"),
        ({"epsilon": True}, "must be a number"),
        ({"delta": None}, "has an epsilon and no delta"),
        ({"delta": 1.0}, "delta of the claim against model consumers must be in"),
        ({"delta": -1e-9}, "must be in"),
        ({"delta": math.nan}, "must be in"),
        ({"epsilon": None, "delta": 2.0}, "must be in"),
        ({"against": ""}, "against of a claim is empty"),
        ({"unit": "  "}, "unit of a claim is empty"),
        ({"because": None}, "because of a claim must be a text"),
        ({"relation": 3}, "relation of a claim must be a text"),
        ({"assumes": "honest"}, "must be a tuple of texts"),
        ({"assumes": ("",)}, "is empty"),
        ({"because": "noise)\n  against server, record: epsilon <= 0.10"}, "one line of printable characters"),
        ({"unit": "record\u202e"}, "one line of printable characters"),
    ],
)
def test_what_is_no_claim_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(says)):
        a_claim(**changes)


# ── reports ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_report_lists_claims_by_adversary_in_its_own_order() -> None:
    assert str(REPORT).splitlines() == [
        "A federation",
        "  against server, client: NO GUARANTEE (it receives each client's update)",
        "  against model consumers, record: epsilon <= 1.24 at delta = 1e-05, adding or removing one example "
        "(DP-SGD at each client; assumes 1)",
        "  assumed:",
        "    1. records are disjoint",
        "  not covered: timing; number of records",
        "  note: two rounds",
    ]
    assert REPORT.against("server") == (MISSING,)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"claims": (KEPT,)}, "Nothing is said about 'server'"),
        ({"adversaries": ("model consumers",)}, "A claim is against 'server'"),
        ({"adversaries": ()}, "each named once"),
        ({"adversaries": ("server", "server", "model consumers")}, "each named once"),
        ({"claims": [KEPT, MISSING]}, "a tuple of Claim"),
        ({"claims": (KEPT, "server: fine")}, "a tuple of Claim"),
        ({"title": ""}, "title of a report is empty"),
        ({"not_covered": "timing"}, "not_covered of a report must be a tuple"),
        ({"notes": ("a\nb",)}, "one line of printable characters"),
    ],
)
def test_an_incomplete_report_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(says)):
        dataclasses.replace(REPORT, **changes)


def test_what_several_claims_assume_is_said_once_and_numbered() -> None:
    more = a_claim(unit="client", assumes=("the server is honest", "records are disjoint"))
    unused = dataclasses.replace(MISSING, assumes=("nothing that matters",))
    report = dataclasses.replace(REPORT, claims=(more, KEPT, unused))
    assert report.assumptions == ("the server is honest", "records are disjoint")
    assert [report.numbers(claim) for claim in (more, KEPT, unused)] == [(1, 2), (2,), ()]
    assert str(report).count("records are disjoint") == 1
    words = read(report).seen("body")
    assert words.count("records are disjoint") == 1
    assert {"assumes 1, 2", "assumes 2"} <= set(words)


def test_an_unknown_adversary_is_no_empty_answer() -> None:
    with pytest.raises(ParameterError, match="adversary must be one of"):
        REPORT.against("nobody")


def test_a_report_goes_through_json_unchanged() -> None:
    assert AdversaryReport.from_json(REPORT.to_json()) == REPORT
    values = json.loads(REPORT.to_json())
    assert values["schema"] == "dpdl.claims/1"
    assert [claim["guaranteed"] for claim in values["claims"]] == [True, False]
    assert values["claims"][1]["epsilon"] is None


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(schema="dpdl.report/1"),
        lambda v: v.pop("claims"),
        lambda v: v.update(claims=None),
        lambda v: v.update(claims=["fine"]),
        lambda v: v.update(notes="fine"),
        lambda v: v["claims"][0].pop("because"),
        lambda v: v["claims"][0].update(epsilon=0.1),  # the text says otherwise
        lambda v: v.update(text="all is well"),
    ],
)
def test_a_changed_file_is_refused(change: Any) -> None:
    values = json.loads(REPORT.to_json())
    change(values)
    with pytest.raises(ParameterError):
        AdversaryReport.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "[]", "null", "3"])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="Not an adversary report"):
        AdversaryReport.from_json(text)


# ── the page ────────────────────────────────────────────────────────────────────────────────────────


class Read(HTMLParser):
    """Checks that tags nest, and keeps what a reader sees."""

    EMPTY = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((tuple(self.open), data.strip()))

    def seen(self, *within: str) -> list[str]:
        return [text for path, text in self.texts if "style" not in path and all(tag in path for tag in within)]


def read(report: AdversaryReport) -> Read:
    reader = Read()
    reader.feed(report.to_html())
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_says_all_that_the_text_says() -> None:
    seen = " ".join(read(REPORT).seen("body"))
    for claim in REPORT.claims:
        for text in (claim.against, claim.unit, claim.because, claim.relation, *claim.assumes):
            assert text in seen
    for text in (REPORT.title, *REPORT.not_covered, *REPORT.notes, "epsilon ≤ 1.24", "at delta = 1e-05"):
        assert text in seen


def test_what_is_not_guaranteed_stands_above_the_table_and_in_its_row() -> None:
    reader = read(REPORT)
    words = reader.seen("body")
    assert words.index("✕ NO GUARANTEE") < words.index("Adversary")
    assert "against server: client" in reader.seen("section")
    assert "✕ NO GUARANTEE" in reader.seen("table", "strong")
    assert [attributes.get("class") for tag, attributes in reader.tags if tag == "tr"] == [None, "none", "kept"]


def test_a_report_in_which_all_is_guaranteed_raises_no_alarm() -> None:
    kept = dataclasses.replace(REPORT, adversaries=("model consumers",), claims=(KEPT,), not_covered=())
    reader = read(kept)
    assert not any("NO GUARANTEE" in text for text in reader.seen("body"))
    assert "One claim, with a guarantee." in reader.seen("body")
    assert "The report names nothing." in reader.seen("body")


def test_every_adversary_has_a_cell_beside_all_its_claims() -> None:
    more = a_claim(unit="client")
    reader = read(dataclasses.replace(REPORT, claims=(KEPT, MISSING, more)))
    spans = [attributes["rowspan"] for tag, attributes in reader.tags if attributes.get("scope") == "rowgroup"]
    assert spans == ["1", "2"]
    assert reader.seen("tbody", "th") == ["server", "model consumers"]


def test_names_from_other_parties_cannot_become_markup() -> None:
    evil = "<img src=x onerror=alert(1)>\"'&</td><script>"
    report = AdversaryReport(
        title=evil,
        adversaries=(evil,),
        claims=(Claim(against=evil, unit=evil, because=evil, relation=evil, assumes=(evil,), epsilon=1, delta=0),),
        not_covered=(evil,),
        notes=(evil,),
    )
    reader = read(report)
    assert {tag for tag, _ in reader.tags}.isdisjoint({"img", "script"})
    assert reader.seen("body").count(evil) >= 6


def test_the_page_loads_and_runs_nothing() -> None:
    html = REPORT.to_html()
    reader = read(REPORT)
    assert {tag for tag, _ in reader.tags}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "base", "form", "a"}
    )
    assert not any(
        name.startswith("on") or name in {"href", "src", "style"} for _, held in reader.tags for name in held
    )
    assert "url(" not in html
    assert "@import" not in html
    assert "http://" not in html
    assert "https://" not in html
    policies = [held["content"] for tag, held in reader.tags if held.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, contrast ratio of two colours written as #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_words_can_be_read_in_light_and_in_dark(theme: int) -> None:
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", REPORT.to_html().split("@media (prefers")[theme]))
    for text, ground in (
        ("ink", "ground"),
        ("ink", "card"),
        ("soft", "ground"),
        ("soft", "card"),
        ("good", "card"),
        ("bad", "bad-ground"),
        ("ink", "bad-ground"),
        ("soft", "bad-ground"),
        ("ink", "warn-ground"),
    ):
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
