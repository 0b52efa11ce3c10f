"""The cost tables as a picture: bars are calculated, crosses published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["chart", "draw_chart"]

COLORS = {"large batch": "#7a7a7a", "federated": "#9b2226", "split": "#0b6e4f"}
VGG = "VGG-16, hidden 4096, cut after 1 convolution"
RESNET = "ResNet-50, stem 3x3, cut after the stem"
CLIENTS = (100, 500)
WIDTH = 0.25


def draw_chart(record: Mapping[str, Any], path: Path) -> None:
    """Write the picture, in the format that the path's ending names.

    Args:
        record: of the benchmark.
        path: e.g. split_cost.svg.
    """
    chart(record).savefig(path, dpi=150)


def chart(record: Mapping[str, Any]) -> Figure:
    """The picture, not yet written."""
    from matplotlib.figure import Figure  # optional: the extra "plots"

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = record["networks"][VGG]["first_table"]
    for place, (name, color) in enumerate(COLORS.items()):
        spots = [group + (place - 1) * WIDTH for group in range(len(CLIENTS))]
        left.bar(spots, first["tflops"][name], width=0.9 * WIDTH, color=color, label=name)
        left.plot(spots, record["published_tflops"][name], "kx", markersize=7)
    left.set_title(f"{VGG}\n{first['epochs_fitted']:.1f} epochs, fitted", fontsize=9)
    left.set_ylabel("TFLOPs of one client")
    left.set_yscale("log")
    second = record["networks"][RESNET]["second_table"]
    for place, (name, color) in enumerate(COLORS.items()):
        row = second[name]
        spots = [group + (place - 1) * WIDTH for group in range(len(CLIENTS))]
        label = f"{name}: {row['fitted']:.1f} {row['unknown']}, fitted"
        right.bar(spots, row["gigabytes"], width=0.9 * WIDTH, color=color, label=label)
        right.plot(spots, record["published_gigabytes"][name], "kx", markersize=7)
    right.set_title(RESNET, fontsize=9)
    right.set_ylabel("GB sent and received by one client")
    left.plot([], [], "kx", label="published, arXiv:1812.00564")
    for axes in (left, right):
        axes.set_xticks(range(len(CLIENTS)), [f"{clients} clients" for clients in CLIENTS])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    return figure
