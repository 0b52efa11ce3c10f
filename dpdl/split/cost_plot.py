"""Bytes over the number of clients, of split, federated and large-batch training: where the lines cross."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dpdl.errors import DataError, ParameterError
from dpdl.split.cost import Workload, compare
from dpdl.split.network_cost import NetworkCost

__all__ = ["plot_cost"]

_COLORS = {"split": "#0b6e4f", "federated": "#9b2226", "large batch": "#7a7a7a"}
_GIGABYTE = 1e9
_PANELS = (("client_bytes", "one client, GB"), ("total_bytes", "all clients, GB"))


def plot_cost(network: NetworkCost, workload: Workload, path: str | Path, *, title: str = "Bytes moved") -> None:
    """Write a figure with two panels: bytes of one client, and of all, from one client to ten times the workload's.

    Args:
        network: as measured.
        workload: all but its number of clients stays as it is, the records included.
        path: where to; its suffix chooses the format (.png, .pdf, .svg).
        title: above it.

    Raises:
        DataError: matplotlib is not installed.
        ParameterError: the suffix names no format, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # optional: the extra "plots"
    except ImportError as error:
        raise DataError("Plots need matplotlib: pip install 'dpdl[plots]'.") from error
    most = 10 * workload.clients
    numbers = sorted({round(most ** (step / 40)) for step in range(41)})
    reports = [compare(network, replace(workload, clients=number)) for number in numbers]
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, (field, label) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        for name, color in _COLORS.items():
            values = [getattr(report.scheme(name), field) / _GIGABYTE for report in reports]
            axes.plot(numbers, values, color=color, label=name)
        axes.axvline(workload.clients, color="#cccccc", linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("clients, the same records in all")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    crossing = reports[0].break_even["federated"]
    if crossing is not None and 1 < crossing <= most:
        axes.axvline(crossing, color=_COLORS["split"], linestyle=":", linewidth=1.0, label=f"{crossing:,} clients")
    axes.legend(frameon=False, fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ParameterError(f"path: the figure cannot be written to {path}: {error}") from error
