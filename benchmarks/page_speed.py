"""What the results of engines, models, noise and split learning's costs read like on the page of benchmarks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.engine_candidates import PEERS, PLAIN
from benchmarks.engine_targets import FIRST_STEP, MEMORY, OVERHEAD_MILLISECONDS
from benchmarks.page_table import NONE, number, table

__all__ = ["engines", "noise", "split_channel", "split_cost", "split_step", "zoo"]

OURS = "tape"
NOISE = "noise"

Record = Mapping[str, Any]


def engines(record: Record) -> str:
    """Time, memory, overhead; then what is above its target, and where a peer is faster."""
    by_threads = {threads: [row for row in record["time"] if row["threads"] == threads] for threads in (1, 2)}
    rows = by_threads[1]
    head = ["model (batch)", "plain, ms", "tape", "target", "stretch", "vmap", "best peer", "floor", "first step"]
    parts = ["One thread; ratios to the plain step, the first step in plain steps:\n", table(head, map(_time, rows))]
    if by_threads[2]:
        ratios = ", ".join(f"{row['title']} {_ratio(row, OURS)}" for row in by_threads[2])
        parts.append(f"With two threads the tape takes: {ratios}.\n")
    if record["memory"]:
        head = ["model (batch)", "plain", OURS, "over plain", "target", "vmap", "least peer"]
        parts += ["Peak memory over the weights and the batch, MiB:\n", table(head, map(_memory, record["memory"]))]
    parts += ["**What falls short.**\n", *(f"- {line}" for line in _short_of_targets(record, rows)), ""]
    return "\n".join(parts)


def _time(row: Record) -> Sequence[str]:
    figures = row["candidates"][OURS]
    spread = f"**{figures['ratio']:.2f}** ({figures['low']:.2f} to {figures['high']:.2f})"
    peer = _best_peer(row)
    return (
        row["title"],
        number(row["plain_ms"], 1),
        spread,
        number(row["target"]),
        number(row["stretch"]),
        _ratio(row, "vmap"),
        f"{row['candidates'][peer]['ratio']:.2f} ({peer})" if peer else NONE,
        _ratio(row, "floor"),
        number(figures["first_step"], 1),
    )


def _best_peer(row: Record) -> str | None:
    measured = [name for name in PEERS if "ratio" in row["candidates"].get(name, {})]
    return min(measured, key=lambda name: row["candidates"][name]["ratio"], default=None)


def _ratio(row: Record, name: str) -> str:
    return number(row["candidates"].get(name, {}).get("ratio"))


def _memory(row: Record) -> Sequence[str]:
    used = {name: figures["process"] for name, figures in row["candidates"].items() if "process" in figures}
    peer = min((name for name in PEERS if name in used), key=lambda name: used[name], default=None)
    return (
        row["title"],
        _mebibytes(used.get(PLAIN)),
        _mebibytes(used.get(OURS)),
        number(_over_plain(row)),
        number(MEMORY.target),
        _mebibytes(used.get("vmap")),
        f"{_mebibytes(used[peer])} ({peer})" if peer else NONE,
    )


def _over_plain(row: Record) -> float | None:
    used = {name: figures["process"] for name, figures in row["candidates"].items() if "process" in figures}
    return used[OURS] / used[PLAIN] if OURS in used and PLAIN in used else None


def _mebibytes(count: float | None) -> str:
    return number(None if count is None else count / (1 << 20), 1)


def _short_of_targets(record: Record, rows: Sequence[Record]) -> list[str]:
    late = [r for r in rows if r["candidates"][OURS]["ratio"] > r["target"]]
    lines = [
        f"Time: {len(late)} of {len(rows)} models are above their target: {_listed(late)}."
        if late
        else "Time: nothing."
    ]
    beaten = [(r, p) for r in rows if (p := _best_peer(r)) and _of(r, p) < _of(r, OURS)]
    if beaten:
        cases = "; ".join(f"{r['title']}: {p} {_of(r, p):.2f}, tape {_of(r, OURS):.2f}" for r, p in beaten)
        lines.append(f"A peer is faster on {len(beaten)}: {cases}.")
    slow = [r for r in rows if r["candidates"][OURS]["first_step"] > FIRST_STEP]
    firsts = "; ".join(f"{r['title']} {r['candidates'][OURS]['first_step']:.1f}" for r in slow)
    lines.append(
        f"First step: above {FIRST_STEP:g} plain steps on {len(slow)}: {firsts}." if slow else "First step: nothing."
    )
    over = [(r, o) for r in record["memory"] if (o := _over_plain(r)) is not None and o > MEMORY.target]
    cases = "; ".join(f"{r['title']} {o:.2f}" for r, o in over)
    lines.append(
        f"Memory: above {MEMORY.target:g} times plain on {len(over)}: {cases}." if over else "Memory: nothing."
    )
    unmeasured = [r["title"] for r in record["memory"] if _over_plain(r) is None]
    if unmeasured:
        lines.append(f"Memory was not measured on: {', '.join(unmeasured)}.")
    if record["overhead"]:
        candidates = record["overhead"]["candidates"]
        beyond = (
            candidates[OURS]["milliseconds"] - candidates[PLAIN]["milliseconds"] - candidates[NOISE]["milliseconds"]
        )
        lines.append(
            f"Overhead: {record['overhead']['title']}: {beyond:.1f} ms besides the plain step and the noise; the "
            f"target is {OVERHEAD_MILLISECONDS:g}."
        )
    return lines


def _of(row: Record, name: str) -> float:
    ratio: float = row["candidates"][name]["ratio"]
    return ratio


def _listed(rows: Sequence[Record]) -> str:
    return "; ".join(f"{row['title']} {_of(row, OURS):.2f} (target {row['target']:.2f})" for row in rows)


# ── models and noise ────────────────────────────────────────────────────────────────────────────────


def zoo(record: Record) -> str:
    """By library: how many are exact by which engine, and which none takes."""
    rows = record["rows"]
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    ways = ["tape", "vmap", "loop"]
    counts = {name: Counter(row["exact_by"] for row in rows if row["library"] == name) for name in libraries}
    others = [way for way in dict.fromkeys(row["exact_by"] for row in rows) if way not in ways]
    head = ["library", "models", *ways, *(str(way or "none") for way in others)]
    lines = [
        [name, str(counts[name].total()), *(str(counts[name][way]) for way in (*ways, *others))] for name in libraries
    ]
    left = [f"{row['library']} {row['model']} ({row['mode']})" for row in rows if row["exact_by"] not in ways]
    text = f"Refused, or exact by no engine: {'; '.join(left)}." if left else "Every model is exact by some engine."
    return f"The first engine that is exact, by library:\n\n{table(head, lines)}\n**What falls short.** {text}\n"


def noise(record: Record) -> str:
    """Milliseconds, one thread and all."""
    by_threads = record["milliseconds_per_million_by_threads"]
    names = list(by_threads["1"])
    lines = [[name, *(number(times[name], 1) for times in by_threads.values())] for name in names]
    heads = [f"{threads} thread{'s' * (threads != '1')}, ms" for threads in by_threads]
    secure = [times["standard_normals (float64, secure)"] for times in by_threads.values()]
    ratio = secure[0] / by_threads["1"]["torch.randn float32"]
    return (
        f"{table(['a million of', *heads], lines)}\n**What falls short.** Secure float64 normals take {ratio:.1f} "
        f"times as long as torch's float32 ones, and are {secure[0] / secure[-1]:.2f} times as fast with all threads.\n"
    )


# ── split learning ──────────────────────────────────────────────────────────────────────────────────


def split_cost(record: Record) -> str:
    """Calculated beside published, for the two networks of the chart; then what is not reproduced."""
    from benchmarks.split_cost_chart import RESNET, VGG

    lines = []
    for clients, at in ((100, 0), (500, 1)):
        for name, published in record["published_tflops"].items():
            calculated = record["networks"][VGG]["first_table"]["tflops"][name][at]
            lines.append([f"TFLOPs, {name}, {clients} clients", number(calculated, 3), f"{published[at]:g}"])
    for clients, at in ((100, 0), (500, 1)):
        for name, published in record["published_gigabytes"].items():
            calculated = record["networks"][RESNET]["second_table"][name]["gigabytes"][at]
            lines.append([f"GB, {name}, {clients} clients", number(calculated), f"{published[at]:g}"])
    missing = "\n".join(f"- {line}" for line in record["not_reproduced"])
    shown = table(["of one client", "calculated", "published"], lines)
    return f"{VGG} (TFLOPs); {RESNET} (GB):\n\n{shown}\n**What is not reproduced.**\n\n{missing}\n"


def split_channel(record: Record) -> str:
    """Milliseconds of each channel."""
    lines = [
        [name, number(row["median"]), f"{row['lower']:.2f} to {row['upper']:.2f}", number(row["beyond"])]
        for name, row in record["milliseconds"].items()
    ]
    return table(["channel", "ms a step, median", "quartiles", "beyond in-process"], lines)


def split_step(record: Record) -> str:
    """Milliseconds of each way, and their ratio to the private step of the whole network."""
    over = "over whole, private"
    lines = [
        [name, number(row["median"], 1), f"{row['lower']:.1f} to {row['upper']:.1f}", number(row[over])]
        for name, row in record["milliseconds"].items()
    ]
    dearest = max(row[over] for row in record["milliseconds"].values())
    return (
        f"{table(['way', 'ms a step, median', 'quartiles', over], lines)}\n**What falls short.** The dearest way takes "
        f"{dearest:.2f} times the private step of the network whole.\n"
    )
