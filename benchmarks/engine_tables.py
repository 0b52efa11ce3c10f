"""The result of a run as tables for the terminal: figure beside target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.engine_candidates import ENGINES, FLOOR, NOISE, PLAIN
from benchmarks.engine_targets import FIRST_STEP, MEMORY, OVERHEAD_MILLISECONDS

__all__ = ["memory_line", "print_tables", "time_line"]

Row = Mapping[str, Any]
MEBI = 1 << 20


def time_line(row: Row) -> str:
    """One finished row of times, in a line."""
    cells = [f"{name} {_ratio(figures)}" for name, figures in row["candidates"].items() if name != PLAIN]
    return f"{row['title']}, {row['threads']} thread(s): plain {row['plain_ms']:.1f} ms; " + ", ".join(cells)


def memory_line(row: Row) -> str:
    """One finished row of memory, in a line."""
    cells = [f"{name} {_megabytes(figures)}" for name, figures in row["candidates"].items()]
    return f"{row['title']}, MiB: " + ", ".join(cells)


def print_tables(console: Console, record: Mapping[str, Any]) -> None:
    """Times for each number of threads, first steps, memory, overhead, and why some are missing."""
    for threads in dict.fromkeys(row["threads"] for row in record["time"]):
        rows = [row for row in record["time"] if row["threads"] == threads]
        console.print(_time_table(rows))
    if record["memory"]:
        console.print(_memory_table(record["memory"]))
    if record["overhead"]:
        console.print(_overhead_table(record["overhead"]))
    errors = {
        f"{name} on {row['title']}: {figures['error']}": None
        for row in (*record["time"], *record["memory"])
        for name, figures in row["candidates"].items()
        if figures.get("error")
    }
    for error in errors:
        console.print(f"– {error}", markup=False, highlight=False)


def _time_table(rows: Sequence[Row]) -> Table:
    names = [name for name in rows[0]["candidates"] if name != PLAIN]
    engines = [name for name in names if name.partition("/")[0] in ENGINES]
    title = (
        f"step over the plain step, {rows[0]['clock']} time, {rows[0]['threads']} thread(s), median, spread below; "
        f"first: the first step in plain steps (target {FIRST_STEP:g})"
    )
    table = Table("model (batch)", "plain ms", "target", "stretch", *names, "first", title=title, show_lines=True)
    for row in rows:
        cells = []
        for name in names:
            figures = row["candidates"][name]
            color = _color(figures.get("ratio"), row) if name in engines else "default"
            cells.append(f"[{color}]{_ratio(figures)}[/]\n{_spread(figures)}")
        firsts = [f"{n} {row['candidates'][n]['first_step']:.1f}" for n in engines if "ratio" in row["candidates"][n]]
        goals = [f"{row[key]:.2f}" if row[key] is not None else "" for key in ("target", "stretch")]
        table.add_row(row["title"], f"{row['plain_ms']:.1f}", *goals, *cells, "\n".join(firsts))
    return table


def _memory_table(rows: Sequence[Row]) -> Table:
    names = list(rows[0]["candidates"])
    title = (
        "peak MiB over the weights and the batch: process (tensors alone), and process over plain "
        f"(target {MEMORY.target:g}, stretch {MEMORY.stretch:g})"
    )
    table = Table("model (batch)", *names, title=title, show_lines=True)
    for row in rows:
        base = row["candidates"][PLAIN].get("process")
        cells = []
        for name in names:
            figures = row["candidates"][name]
            over = f"\n{figures['process'] / base:.2f}" if base and "process" in figures else ""
            cells.append(_megabytes(figures) + over)
        table.add_row(row["title"], *cells)
    return table


def _overhead_table(row: Row) -> Table:
    title = f"{row['title']}: milliseconds besides the plain step (target {OVERHEAD_MILLISECONDS:g}, without the noise)"
    table = Table("step", "ms", "over plain, ms", "and without noise, ms", "engine", title=title)
    noise = row["candidates"][NOISE].get("milliseconds", 0.0)
    for name, figures in row["candidates"].items():
        if "milliseconds" not in figures:
            continue
        over = figures["milliseconds"] - row["plain_ms"]
        extra = [f"{over:.2f}", f"{over - noise:.2f}"] if name not in (PLAIN, FLOOR, NOISE) else ["", ""]
        table.add_row(name, f"{figures['milliseconds']:.2f}", *extra, figures["engine"] or "")
    return table


def _color(ratio: float | None, row: Row) -> str:
    if ratio is None or row["target"] is None:
        return "default"
    return "green" if ratio <= row["stretch"] else "yellow" if ratio <= row["target"] else "red"


def _ratio(figures: Row) -> str:
    return f"{figures['ratio']:.2f}" if "ratio" in figures else "–"


def _spread(figures: Row) -> str:
    return f"{figures['low']:.2f}–{figures['high']:.2f}" if "ratio" in figures else ""


def _megabytes(figures: Row) -> str:
    return f"{figures['process'] / MEBI:.1f} ({figures['tensors'] / MEBI:.1f})" if "process" in figures else "–"
