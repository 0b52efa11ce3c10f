"""Accuracy and every client's epsilon over the rounds of a federated run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from dpdl.errors import DataError, ParameterError
from dpdl.federated.history import History
from dpdl.privacy_report import shown_delta

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_federated"]

MOST_NAMED = 10  # clients in the legend, and colours that tell them apart
_GREEN, _RED, _GREY = "#0b6e4f", "#9b2226", "#7a7a7a"


def plot_federated(history: History, path: str | Path, *, title: str = "Federated training") -> None:
    """Write a figure with two panels: the evaluation above, epsilons below, a line for each client.

    A cross marks a round in which a client refused because its budget was spent. Up to ten clients are named. The
    figure of a run whose participation is secret shows who took part: plot `history.public()` to publish it.

    Args:
        history: of `run_federated`.
        path: where to; its suffix chooses the format (.png, .pdf, .svg).
        title: above it.

    Raises:
        DataError: matplotlib is not installed.
        ParameterError: there is no round to show, the suffix names no format, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # optional: the extra "plots"
    except ImportError as error:
        raise DataError("Plots need matplotlib: pip install 'dpdl[plots]'.") from error
    if not history.rounds:
        raise ParameterError("the history has no rounds to show. Run some first.")

    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.set_title(title, loc="left", fontsize=11)
    _evaluations(above, history)
    _epsilons(below, history)
    below.set_xlabel("round")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ParameterError(f"path: the figure cannot be written to {path}: {error}") from error


def _evaluations(axes: Axes, history: History) -> None:
    looked = [(r.round, r.evaluation) for r in history.rounds if r.evaluation]
    if not looked:
        axes.text(0.5, 0.5, "not evaluated", ha="center", transform=axes.transAxes)
        return
    name = next(iter(looked[-1][1]))  # the first number is the one that counts
    points = [(number, values[name]) for number, values in looked if name in values]
    axes.plot(*zip(*points, strict=True), color=_GREEN, linewidth=2, marker="o", markersize=3)
    axes.annotate(
        f"{points[-1][1]:.3g}", points[-1], xytext=(-6, -14), textcoords="offset points", ha="right", color=_GREEN
    )
    axes.set_ylabel(name)


def _epsilons(axes: Axes, history: History) -> None:
    names = list(dict.fromkeys(name for r in history.rounds for name in r.client_epsilon or ()))
    lines = {name: [point for point in history.of_client(name) if math.isfinite(point[1])] for name in names}
    lines = {name: points for name, points in lines.items() if points}
    few = len(lines) <= MOST_NAMED
    for index, (name, points) in enumerate(lines.items()):
        label = name if few else "clients" if index == 0 else None
        colour, width = (f"C{index}", 1.5) if few else (_GREY, 0.6)
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, label=label)
    spent = _budget_refusals(history, lines)
    if spent:
        axes.scatter(*zip(*spent, strict=True), marker="x", color=_RED, zorder=3, label="budget spent")
    server = [
        (r.round, r.server_epsilon)
        for r in history.rounds
        if r.server_epsilon is not None and math.isfinite(r.server_epsilon)
    ]
    if server:
        axes.plot(*zip(*server, strict=True), color=_RED, linewidth=2, linestyle="--", label="server, of a client")
    if lines or server:
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, frameon=False)
    else:
        axes.text(0.5, 0.5, "no guarantee: no epsilon is finite", ha="center", transform=axes.transAxes)
    axes.set_ylabel(f"epsilon spent, at delta = {shown_delta(history.delta)}")


def _budget_refusals(history: History, lines: dict[str, list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Where to put a cross: the round, and what the client had spent by then."""
    marks = []
    for record in history.rounds:
        for name in record.refused.get("budget", ()):
            before = [epsilon for number, epsilon in lines.get(name, []) if number <= record.round]
            if before:
                marks.append((record.round, before[-1]))
    return marks
