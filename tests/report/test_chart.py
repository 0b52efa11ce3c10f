"""The chart: round ticks, and points where they belong."""

from __future__ import annotations

import re

import pytest

from dpdl.report.chart import Curve, Mark, line_chart, round_numbers
from tests.report.reading import Read


@pytest.mark.parametrize("most", [1e-9, 0.07, 0.3, 1.0, 1.9, 2.0, 3.27, 6.4, 9.99, 49.1, 480, 14_062, 1e6, 7.3e250])
def test_ticks_are_few_and_round(most: float) -> None:
    ticks = round_numbers(most)
    assert ticks[0] == 0
    assert 3 <= len(ticks) <= 8
    assert most * 0.6 < ticks[-1] <= most * (1 + 1e-6)
    leading = f"{ticks[1]:e}"[0]
    assert leading in "125"
    assert all(tick == pytest.approx(i * ticks[1], rel=1e-9) for i, tick in enumerate(ticks))


def drawn(**changes: object) -> Read:
    settings = {
        "name": "x",
        "title": "A title",
        "description": "What one sees",
        "x": "steps",
        "y": "epsilon",
        "curves": [Curve(points=[(0, 0), (5, 1), (10, 2)], kind="curve", name="spent", shaded=True)],
        "marks": [Mark(at=(10, 2), value="2.00")],
        "most": (10.0, 4.0),
    }
    return Read(line_chart(**{**settings, **changes}))  # type: ignore[arg-type]


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]


def test_points_stand_where_the_axes_say() -> None:
    paths = {str(held["class"]): str(held["d"]) for held in drawn().attributes("path") if "440" not in str(held["d"])}
    (top, origin, right) = points(paths["axis"])
    width, height = right[0] - origin[0], origin[1] - top[1]
    for (x, y), at in zip([(0, 0), (5, 1), (10, 2)], points(paths["curve"]), strict=True):
        assert at[0] == pytest.approx(origin[0] + width * x / 10, abs=0.11)
        assert at[1] == pytest.approx(origin[1] - height * y / 4, abs=0.11)
    (dot,) = drawn().attributes("circle")
    assert (float(str(dot["cx"])), float(str(dot["cy"]))) == points(paths["curve"])[-1]


def test_the_legend_names_each_curve_and_the_words_are_escaped() -> None:
    evil = "<script>"
    reader = drawn(
        title=evil, description=evil, x=evil, y=evil, curves=[Curve(points=[(0, 1)], kind="curve", name=evil)]
    )
    assert "script" not in {tag for tag, _ in reader.tags}
    assert evil in reader.seen("li")
    assert reader.seen("svg", "title") == reader.seen("svg", "desc") == [evil]
