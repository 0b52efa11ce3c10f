"""Accuracy and epsilon over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from dpdl.errors import DataError
from dpdl.training import HistoryPoint

__all__ = ["plot_history"]


def plot_history(history: Sequence[HistoryPoint], *, delta: float, title: str, path: Path) -> None:
    """Write a PNG with two panels: test accuracy above, the spent epsilon below.

    Args:
        history: accuracy and epsilon, over epochs.
        delta: of the epsilons.
        title: above both.
        path: the file; one that is there is replaced.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # optional: the extra "plots"
    except ImportError as error:
        raise DataError("Plots need matplotlib: pip install 'dpdl[plots]'.") from error

    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = [point.step for point in history]
    last = history[-1]

    above.plot(steps, [100 * point.test_accuracy for point in history], color="#0b6e4f", linewidth=2)
    above.annotate(
        f"{last.test_accuracy:.1%}",
        (last.step, 100 * last.test_accuracy),
        xytext=(-6, -14),
        textcoords="offset points",
        ha="right",
    )
    above.set_ylabel("test accuracy (%)")
    above.set_title(title, loc="left", fontsize=11)

    if math.isfinite(last.epsilon):
        below.plot(steps, [point.epsilon for point in history], color="#9b2226", linewidth=2)
        below.annotate(
            f"{last.epsilon:.2f}",
            (last.step, last.epsilon),
            xytext=(-6, -14),
            textcoords="offset points",
            ha="right",
        )
    else:
        below.text(0.5, 0.5, "no guarantee: epsilon is infinite", ha="center", transform=below.transAxes)
    below.set_ylabel(f"epsilon spent, at delta = {delta:g}")
    below.set_xlabel("steps (noisy releases)")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
