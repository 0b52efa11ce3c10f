"""The figure: error bars over seeds at the reported epsilons, the non-private line, and what looking costs."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from dpdl.errors import ParameterError
from tests.tradeoff import small_training
from tests.tradeoff.small_training import small

pytest.importorskip("matplotlib")


def drawn(result: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure that is written."""
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        kept.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    result.plot(path, title="A title", score="accuracy")
    return kept[0]


def test_error_bars_are_mean_and_spread_and_the_line_is_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = small(seeds=(0, 1, 2), max_grad_norms=(0.5, 1.0))
    figure = drawn(result, tmp_path / "plot.png", monkeypatch)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    axes = figure.axes[0]
    assert len(axes.containers) == 2
    for container, norm in zip(axes.containers, (0.5, 1.0), strict=True):
        line, _, (bars,) = container.lines
        for x, y, bar, target in zip(*line.get_data(), bars.get_segments(), (1.0, 4.0), strict=True):
            rows = [row for row in result.rows if row.target == target and row.max_grad_norm == norm]
            scores = [row.score for row in rows if row.score is not None]
            assert x == max(row.epsilon for row in rows if row.epsilon is not None)
            assert y == pytest.approx(statistics.mean(scores))
            assert bar[1][1] - bar[0][1] == pytest.approx(2 * statistics.stdev(scores))
    baseline = statistics.mean(row.score for row in result.rows if not row.private and row.score is not None)
    assert any(list(line.get_ydata()) == [pytest.approx(baseline)] * 2 for line in axes.lines)
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any(text.startswith("not private") for text in legend)
    assert any("C = 0.5" in text for text in legend)
    assert "icking the best of the 12 private rows" in figure.get_supxlabel().replace("\n", " ")
    assert axes.get_xlabel().startswith("epsilon of one run, an upper bound at delta = 0.001")


def test_nothing_to_show_or_nowhere_to_write_is_one_error(tmp_path: Path) -> None:
    failed = small(small_training.report_of_nothing)
    with pytest.raises(ParameterError, match="no private row to plot"):
        failed.plot(tmp_path / "plot.png")
    with pytest.raises(ParameterError, match="cannot be written"):
        small(seeds=(0,)).plot(tmp_path / "plot.nonsense")
