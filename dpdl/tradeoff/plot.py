"""Score over epsilon, with error bars over seeds and the non-private line."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpdl.errors import DataError, ParameterError
from dpdl.tradeoff.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_trade_off"]

_COLORS = ("#0b6e4f", "#9b2226", "#1d4e89", "#b07d12", "#6a3d7c", "#3f7f8c")
_GREY = "#6f6f6f"
_LINE_LENGTH = 128  # characters of the remarks below the figure


def plot_trade_off(
    groups: Sequence[Summary],
    path: str | Path,
    *,
    title: str,
    score: str,
    delta: str,
    remarks: Sequence[str],
) -> None:
    """Write the figure; `SweepResult.plot` has the arguments and errors."""
    try:
        from matplotlib.figure import Figure  # optional: the extra "plots"
    except ImportError as error:
        raise DataError("Plots need matplotlib: pip install 'dpdl[plots]'.") from error
    private = [group for group in groups if group.private and math.isfinite(group.epsilon)]
    if not private:
        raise ParameterError(
            "there is no private row to plot. Rows that failed have no score, and a row that was chosen privately "
            "must not be shown beside the others."
        )
    lines = [line for remark in remarks for line in textwrap.wrap(remark, _LINE_LENGTH)]
    figure = Figure(figsize=(8, 4.8 + 0.14 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    _private_lines(axes, private)
    _baseline(axes, [group for group in groups if not group.private])
    axes.set_xscale("log")
    ticks = sorted({group.target or group.epsilon for group in private})
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(f"epsilon of one run, an upper bound at delta = {delta}")
    axes.set_ylabel(score)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.supxlabel("\n".join(lines), fontsize=6.5, color=_GREY, x=0.01, ha="left")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ParameterError(f"path: the figure cannot be written to {path}: {error}") from error


def _private_lines(axes: Axes, groups: Sequence[Summary]) -> None:
    """A line for each clipping norm, batch size and learning rate."""
    series: dict[tuple[float, int, float | None], list[Summary]] = {}
    for group in groups:
        series.setdefault((group.max_grad_norm, group.batch_size, group.lr), []).append(group)
    for index, ((norm, size, lr), points) in enumerate(series.items()):
        points.sort(key=lambda group: group.epsilon)
        label = f"private: C = {norm:g}, batch {size}" + ("" if lr is None else f", lr {lr:g}")
        seeds = {group.runs for group in points}
        axes.errorbar(
            [group.epsilon for group in points],
            [group.mean for group in points],
            yerr=[group.sd or 0.0 for group in points],
            color=_COLORS[index % len(_COLORS)],
            linestyle="-" if index < len(_COLORS) else "--",
            marker="o",
            markersize=4,
            capsize=3,
            label=f"{label} (mean ± sd of {_count(seeds)})",
        )


def _baseline(axes: Axes, groups: Sequence[Summary]) -> None:
    """The best of the non-private settings, as a line with a band."""
    if not groups:
        return
    best = max(groups, key=lambda group: group.mean)
    axes.axhline(
        best.mean,
        color=_GREY,
        linestyle="--",
        label=f"not private: {best.mean:.3f} (mean ± sd of {_count({best.runs})})",
    )
    if best.sd is not None:
        axes.axhspan(best.mean - best.sd, best.mean + best.sd, color=_GREY, alpha=0.15, linewidth=0)


def _count(runs: set[int]) -> str:
    most = max(runs)
    return "one seed" if most == 1 else f"{min(runs)} to {most} seeds" if len(runs) > 1 else f"{most} seeds"
