"""ROC curves of membership attacks on logarithmic axes, where low false positive rates can be seen.

Beside them the curve that no attack can exceed, if an event is given that says what was released.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from accountants import Event, NeighboringRelation
from accountants.meaning.attacks import tpr_at_fpr
from dpdl.audit.membership_result import MembershipResult
from dpdl.errors import DataError, ParameterError

__all__ = ["plot_roc"]

_COLORS = ("#0b6e4f", "#9b2226", "#1d4e89", "#b5651d")
_LEAST_RATE = 1e-5  # where the axes end, if not before
_BOUND_POINTS = 60


def plot_roc(
    results: Sequence[MembershipResult],
    path: str | Path,
    *,
    event: Event | None = None,
    relation: NeighboringRelation | str = NeighboringRelation.ADD_OR_REMOVE,
    title: str = "Membership inference",
) -> None:
    """Write a figure with a curve for each result, chance, and the bound that the event's accounting gives.

    Args:
        results: what attacks found, one or more.
        path: where to; its suffix chooses the format (.png, .pdf, .svg).
        event: what was released, for the bound; None draws none.
        relation: of the bound.
        title: above it.

    Raises:
        DataError: matplotlib is not installed.
        ParameterError: there are no results, or the suffix names no format.
    """
    if not results:
        raise ParameterError("There are no results to plot. Give one or more.")
    try:
        from matplotlib.figure import Figure  # optional: the extra "plots"
    except ImportError as error:
        raise DataError("Plots need matplotlib: pip install 'dpdl[plots]'.") from error
    least = max(_LEAST_RATE, min(1 / (2 * len(result.non_members)) for result in results))
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    grid = np.geomspace(least, 1, _BOUND_POINTS)
    axes.plot(grid, grid, color="#7a7a7a", linestyle=":", label="chance")
    if event is not None:
        bound = tpr_at_fpr(event, grid, relation=relation)
        axes.plot(grid, bound, color="black", linestyle="--", label="no attack can be above")
    for number, result in enumerate(results):
        fpr, tpr = result.roc()
        label = f"{result.attack}, AUC {result.auc:.3f}"
        color = _COLORS[number % len(_COLORS)]
        axes.step(np.maximum(fpr, least), np.maximum(tpr, least), where="post", color=color, label=label)
    axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.05))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as error:
        raise ParameterError(f"{path} cannot be written: {error}") from error
