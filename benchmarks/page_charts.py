"""The charts of the page of benchmarks: each takes a results file's content and gives a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import audit_chart, engine_chart, split_cost_chart
from benchmarks.mnist_accuracy import PUBLISHED_ACCURACY
from benchmarks.page_accuracy import audits_of, refuted
from dpdl.privacy_report import rounded_up

__all__ = ["CHARTS"]

Record = Mapping[str, Any]

OURS, OURS_LIGHT, MARK = "#0b6e4f", "#9fcfb4", "#c1121f"
PEER_COLORS = ("#6d597a", "#b5a7bf", "#bc6c25", "#e0a458", "#577590", "#a9bccb")


def engines(record: Record) -> Figure:
    return engine_chart.chart([row for row in record["time"] if row["threads"] == 1])


def split_cost(record: Record) -> Figure:
    return split_cost_chart.chart(record)


def audit(record: Record) -> Figure:
    rows = [{**row, "audits": audits_of(row), "refuted": refuted(row)} for row in record["rows"]]
    return audit_chart.chart({**record, "rows": rows})


def accounting(record: Record) -> Figure:
    names = list(record["summary"])
    colors = dict(zip(names, (OURS, OURS_LIGHT, *PEER_COLORS), strict=True))
    cases = {case: answers for case, answers in record["cases"].items() if len(answers) > 2}
    figure, axes = _figure(9, 6.4)
    place = 0.0
    for case, answers in cases.items():
        top = place
        for name in names:
            answer = answers.get(name, {"status": "not asked"})
            if answer["status"] == "ok":
                axes.barh(place, answer["cpu_s"], color=colors[name], height=0.85)
                axes.text(answer["cpu_s"] * 1.1, place, f"{answer['cpu_s']:.3g} s", va="center", fontsize=6)
            else:
                axes.text(
                    1.1e-3, place, answer.get("text") or answer["status"], va="center", fontsize=6, color="#777777"
                )
            place += 1
        axes.text(0.9e-3, (top + place - 1) / 2, case, ha="right", va="center", fontsize=8)
        place += 1
    axes.set_xscale("log")
    axes.set_xlim(1e-3, 200)
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.margins(y=0.01)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("processor seconds, from empty caches")
    handles = [axes.barh([0], [0], color=colors[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=7, frameon=False)
    return figure


def mnist(record: Record) -> Figure:
    points = record["training"]["history"]
    figure, axes = _figure(7, 3.6)
    axes.plot([p["epsilon"] for p in points], [100 * p["test_accuracy"] for p in points], color=OURS, marker=".")
    last = record["training"]["test_accuracy"]
    axes.plot(record["epsilon"], 100 * last, "o", color=OURS, label=f"this run: {100 * last:.2f} %")
    axes.plot(3.0, 100 * PUBLISHED_ACCURACY, "x", color=MARK, markersize=8, label="published: 98.1 % at 3")
    axes.set_ylim(bottom=75, top=100)
    axes.set_xlabel("epsilon spent, delta = 1e-5")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def federated(record: Record) -> Figure:
    names = list(record["accuracy"])
    figure, axes = _figure(8, 3.4)
    for place, name in enumerate(names):
        for shift, run in enumerate(record["accuracy"][name]["runs"]):
            color = "#8a8a8a" if name.startswith("none") else OURS
            axes.barh(place + 0.4 * shift, 100 * run["accuracy"], height=0.36, color=color)
    axes.set_yticks([place + 0.2 for place in range(len(names))], names, fontsize=8)
    axes.axvline(10, color=MARK, linewidth=1, linestyle=":")
    axes.text(11, -0.42, "a guess", color=MARK, fontsize=7, va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("test accuracy, %")
    return figure


def split_accuracy(record: Record) -> Figure:
    """Two bars a run: what it learns, and what an attacker recovers."""
    runs = {name: row for name, row in record["runs"].items() if "decoder_recovered_variance" in row}
    figure, axes = _figure(8, 5.2)
    labels = []
    for place, (name, row) in enumerate(runs.items()):
        server = next(c for c in row["claims"] if c["against"] == "server" and c["unit"] == "record")
        bounded = server["epsilon"] is not None
        axes.barh(place - 0.2, 100 * row["accuracy"], height=0.36, color=OURS if bounded else "#8a8a8a")
        axes.barh(place + 0.2, 100 * max(row["decoder_recovered_variance"], 0.0), height=0.36, color="#e5989b")
        bound = f"epsilon <= {rounded_up(server['epsilon'])} against the server" if bounded else "no bound against it"
        labels.append(f"{name}\n{bound}")
    axes.set_yticks(range(len(runs)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("%")
    handles = [
        axes.barh([0], [0], color=OURS, label="test accuracy, bounded against the server"),
        axes.barh([0], [0], color="#8a8a8a", label="test accuracy, no bound"),
        axes.barh([0], [0], color="#e5989b", label="variance of the images that a decoder recovers"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=7, frameon=False)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


CHARTS: Mapping[str, Callable[[Record], Figure]] = {
    "engines.svg": engines,
    "accounting.svg": accounting,
    "mnist_accuracy.svg": mnist,
    "federated.svg": federated,
    "split_accuracy.svg": split_accuracy,
    "split_cost.svg": split_cost,
    "audit.svg": audit,
}
