"""The page of benchmarks is what the results give, and every results file says how it came about."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page
from benchmarks.environment import RESULTS
from benchmarks.page_sections import SECTIONS

FILES = sorted(RESULTS.glob("*.json"))
# Figures that chose constants in the code; they stand with the constants, not on the page.
NOT_ON_THE_PAGE = {"convolution_rules.json", "product_rules.json", "recurrent_rules.json"}


def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def section(name: str) -> page.Section:
    (found,) = [section for section in SECTIONS if section.file == name]
    return found


def test_the_page_is_what_the_results_give() -> None:
    assert page.PAGE.read_text() == page.page(), "python -m benchmarks.page"


@pytest.mark.parametrize("one", page.charted(), ids=lambda one: str(one.chart))
def test_a_chart_is_of_the_results_that_are_there(one: page.Section) -> None:
    assert page.drawn(one) == page.digest(one), "python -m benchmarks.page"
    assert one.alt


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_results_file_names_its_hardware_and_versions(path: Path) -> None:
    assert page.lacking(json.loads(path.read_text())) == []


def test_what_a_file_does_not_say_is_said() -> None:
    silent = {key: value for key, value in record("noise.json").items() if key not in ("date", "packages", "processor")}
    assert "at a date that is not on record" in page.made(silent)
    assert "does not say: date, versions of packages, the processor." in page.made(silent)
    without = copy.deepcopy(record("engines.json"))
    del without["environment"]["processor"]
    assert "does not say: the processor." in page.made(without)


def test_every_results_file_is_on_the_page() -> None:
    assert {path.name for path in FILES} - NOT_ON_THE_PAGE <= {one.file for one in SECTIONS}


def test_a_figure_above_its_target_is_named() -> None:
    text = section("engines.json").text
    changed = copy.deepcopy(record("engines.json"))
    row = changed["time"][0]
    row["candidates"]["tape"]["ratio"] = row["target"] - 0.01
    assert f"{row['title']} {row['target'] - 0.01:.2f} (target" not in text(changed)
    row["candidates"]["tape"]["ratio"] = row["target"] + 0.51
    assert f"{row['title']} {row['target'] + 0.51:.2f} (target {row['target']:.2f})" in text(changed)
    row["candidates"]["opacus ew"]["ratio"] = row["target"] + 0.4
    assert f"{row['title']}: opacus ew {row['target'] + 0.4:.2f}, tape" in text(changed)


def test_an_accountant_that_misses_is_named() -> None:
    text = section("accounting.json").text
    changed = copy.deepcopy(record("accounting.json"))
    assert "is held" in text(changed)
    changed["summary"]["accountants PRV"]["unsound"] = 1
    assert "is NOT held" in text(changed)


def test_an_accuracy_below_the_published_one_is_named() -> None:
    text = section("mnist_accuracy.json").text
    changed = copy.deepcopy(record("mnist_accuracy.json"))
    changed["training"]["test_accuracy"] = 0.9705
    assert "1.05 points below" in text(changed)
    changed["training"]["test_accuracy"] = 0.9811
    assert "Nothing: the published figure is reached" in text(changed)


def test_a_section_without_results_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    assert page.page().count("Not measured yet") == len(SECTIONS)
