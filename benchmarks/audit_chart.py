"""The audit table as a picture: what was claimed, and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["chart", "draw_chart"]

COLORS = {True: "#0b6e4f", False: "#9b2226"}
LEAST = 0.1  # where the axis begins: a bound of 0 has no logarithm


def draw_chart(record: Mapping[str, Any], path: Path) -> None:
    """Write the picture, in the format that the path's ending names.

    Args:
        record: of the benchmark.
        path: e.g. audit.svg.
    """
    chart(record).savefig(path)


def chart(record: Mapping[str, Any]) -> Figure:
    """The picture, not yet written."""
    from matplotlib.artist import Artist  # optional: the extra "plots"
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    models = list(dict.fromkeys(row["model"] for row in record["rows"]))
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    figure.suptitle("Empirical epsilon (bars) beside the claimed one (marks)", fontsize=11)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        rows = [row for row in record["rows"] if row["model"] == model]
        for place, row in enumerate(rows):
            found = max(float(row["epsilon_lower"]), LEAST)
            axes.barh(
                place, found - LEAST, left=LEAST, color=COLORS[2 * row["refuted"] <= len(row["audits"])], height=0.6
            )
            axes.plot([row["claimed_epsilon"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
            end = max(found, row["claimed_epsilon"])
            axes.annotate(f"  {float(row['epsilon_lower']):.1f}", (end, place), va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [f"{row['training']}\n({row['plan']})" for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set(xscale="log", xlim=(LEAST, 1000), xlabel=f"epsilon at delta = {record['settings']['delta']:g}")
        axes.set_title(model, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    marks: list[Artist] = [
        Patch(color=COLORS[True], label="claim survives"),
        Patch(color=COLORS[False], label="claim refuted"),
    ]
    marks.append(Line2D([], [], color="black", linewidth=2, label="claimed"))
    figure.legend(handles=marks, frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure
