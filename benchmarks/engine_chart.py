"""The figures as a picture: for each model, bars of the ratio to the plain step, with marks at the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.engine_candidates import PEERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["chart", "draw_chart"]

OURS = {"tape": "#0b6e4f", "auto": "#52a67c", "vmap": "#9fcfb4", "loop": "#d3e8dc"}
PEER_COLORS = dict(zip(PEERS, ("#6d597a", "#8d7b9a", "#b5a7bf", "#d8cfde", "#e0a458"), strict=True))
INCHES_A_BAR = 0.17
LEAST_RATIO = 0.8  # where the axis begins


def draw_chart(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the picture, in the format that the path's ending names.

    Args:
        rows: of the result file, all of one number of threads.
        path: e.g. engines.svg.
    """
    chart(rows).savefig(path, dpi=150)


def chart(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The picture, not yet written."""
    from matplotlib.figure import Figure  # optional: the extra "plots"

    names = [n for n in (*OURS, *PEER_COLORS) if any("ratio" in row["candidates"].get(n, {}) for row in rows)]
    height = 1.4 + INCHES_A_BAR * sum(len(names) + 1 for _ in rows)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    place = 0.0
    for row in rows:
        measured = [(n, row["candidates"][n]) for n in names if "ratio" in row["candidates"].get(n, {})]
        top = place
        for name, figures in measured:
            color = (OURS | PEER_COLORS)[name]
            spread = [[figures["ratio"] - figures["low"]], [figures["high"] - figures["ratio"]]]
            axes.barh(place, figures["ratio"] - LEAST_RATIO, left=LEAST_RATIO, color=color, height=0.85)
            axes.errorbar(figures["ratio"], place, xerr=spread, color="#333333", linewidth=0.8)
            axes.text(figures["high"] * 1.02, place, f"{figures['ratio']:.2f}", va="center", fontsize=6)
            place += 1
        between = (top - 0.6, place - 0.4)
        if row["target"] is not None:
            axes.plot([row["target"]] * 2, between, color="#c1121f", linewidth=1.4)
            axes.plot([row["stretch"]] * 2, between, color="#c1121f", linewidth=1.0, linestyle=":")
        axes.text(LEAST_RATIO * 0.98, (top + place - 1) / 2, row["title"], ha="right", va="center", fontsize=8)
        place += 1
    axes.set_xscale("log")
    axes.set_xlim(left=LEAST_RATIO)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_yticks([])
    ticks = [1, 1.5, 2, 3, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("time of a private step over the plain step of the same model (median; line: spread)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles: list[Any] = [axes.barh([0], [0], color=(OURS | PEER_COLORS)[name], label=_label(name)) for name in names]
    handles += axes.plot([], [], color="#c1121f", linewidth=1.4, label="target")
    handles += axes.plot([], [], color="#c1121f", linewidth=1.0, linestyle=":", label="stretch")
    figure.legend(handles=handles, loc="outside upper center", ncols=6, fontsize=7, frameon=False)
    return figure


def _label(name: str) -> str:
    return f"dpdl {name}" if name in OURS else name
