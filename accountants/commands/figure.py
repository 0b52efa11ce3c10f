"""Two figures: epsilon over the steps of a plan, and what the trade-off curve keeps out of an attacker's reach.

matplotlib is optional, and loaded when a figure is drawn. Figures go to a file, never to a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from accountants.components.component import Array
from accountants.errors import ParameterError, PrivacyError
from accountants.relation import NeighboringRelation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVE, _SHADE = "#9b2226", "#e9d8a6"


def plot_epsilon(
    steps: Sequence[int], epsilons: Sequence[float] | Array, *, delta: float, relation: NeighboringRelation, path: Path
) -> None:
    """Write a figure of epsilon, an upper bound, over steps.

    Args:
        steps: numbers of noisy steps, ascending.
        epsilons: at each; infinite ones are left out, and said so.
        delta: of every epsilon.
        relation: of every epsilon.
        path: where to; its suffix chooses the format (.png, .pdf, .svg).

    Raises:
        PrivacyError: matplotlib is not installed.
        ParameterError: the file cannot be written, or its suffix names no format.
    """
    figure, axes = _axes()
    finite = [(step, epsilon) for step, epsilon in zip(steps, epsilons, strict=True) if math.isfinite(epsilon)]
    if finite:
        axes.plot(*zip(*finite, strict=True), color=_CURVE, linewidth=2, marker="o", markersize=3)
    else:
        axes.text(0.5, 0.5, "no guarantee: epsilon is infinite", ha="center", transform=axes.transAxes)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("steps (noisy releases)")
    axes.set_ylabel("epsilon (upper bound)")
    _finish(figure, axes, f"Privacy spent at delta {delta!r}, {relation.phrase}", path)


def plot_trade_off(alpha: Array, beta: Array, *, relation: NeighboringRelation, title: str, path: Path) -> None:
    """Write a figure of the trade-off curve, the region that no attacker reaches shaded.

    Args:
        alpha: false positive rates, ascending, shape [M].
        beta: lower bounds on the false negative rate at each.
        relation: of the bounds.
        title: what the bounds hold for, with its delta.
        path: as in `plot_epsilon`.

    Raises:
        PrivacyError: as in `plot_epsilon`.
        ParameterError: as in `plot_epsilon`.
    """
    figure, axes = _axes()
    axes.fill_between(alpha, np.zeros(len(alpha)), beta, color=_SHADE, label="out of any attacker's reach")
    axes.plot(alpha, beta, color=_CURVE, linewidth=2, label="least error of any attack")
    axes.plot([0, 1], [1, 0], color="0.5", linestyle=":", label="guessing without looking")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.set_xlabel("false positive rate (type I error)")
    axes.set_ylabel("false negative rate (type II error)")
    axes.legend(loc="upper right", frameon=False)
    _finish(figure, axes, f"{title}\n{relation.phrase}", path)


def _axes() -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure  # optional: the extra "plots"
    except ImportError as error:
        raise PrivacyError("Plots need matplotlib: pip install 'dpdl[plots]'.") from error
    figure = Figure(figsize=(6, 5), layout="constrained")
    return figure, figure.subplots()


def _finish(figure: Figure, axes: Axes, title: str, path: Path) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ParameterError(
            f"the plot cannot be written to {str(path)!r}: {error}. Give a path such as plot.png."
        ) from None
