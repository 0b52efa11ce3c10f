"""A private step over the plain step of the same model: time, memory, first step and overhead of each engine.

    python -m benchmarks.engines                              # all; writes benchmarks/results/engines.json
    python -m benchmarks.engines --models mnist vit --engines tape auto --no-peers --no-memory
    python -m benchmarks.engines --threads 1 2 --chart engines.svg
    python -m benchmarks.engines --quick                      # small batches: does everything run?
    python -m benchmarks.engines --chunks                     # vmap by chunk size, for dpdl/per_sample/vmap.py

A step is zero_grad, forward, loss, backward, clipping, noise and update, through `dpdl.make_private`. Everything
is measured in the same run, in turns: the plain step, the floor (plain and one `torch.randn` a parameter), the
secure noise alone, dpdl's engines, and the peers. One thread is measured in process CPU time, which a busy
machine changes least, more threads in wall time. Figures to compare are the ratios.

The peers need Opacus; where it cannot be imported, its rows say so. Models: benchmarks/engine_models.py.
Targets: benchmarks/engine_targets.py. How memory is measured: benchmarks/engine_memory.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.engine_candidates import ENGINES, FLOOR, NOISE, PEERS, PLAIN
from benchmarks.engine_chart import draw_chart
from benchmarks.engine_memory import measure_in_subprocess
from benchmarks.engine_models import CASES, OVERHEAD, Case
from benchmarks.engine_tables import memory_line, print_tables, time_line
from benchmarks.engine_targets import TIME
from benchmarks.engine_timing import WARM_UP, Outcome, clock_for, measure
from benchmarks.environment import PACKAGES, RESULTS, environment

REPEATS = 7
FILE_WIDTH = 240  # columns, where the output is no terminal
OVERHEAD_REPEATS = 51  # a step takes milliseconds
QUICK_SIZE, QUICK_REPEATS = 8, 3
CHUNK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def time_row(case: Case, names: Sequence[str], *, threads: int, repeats: int, size: int) -> dict[str, Any]:
    """One row of the result: every candidate's ratio to the plain step, or why it has none."""
    outcomes = measure(case, names, size=size, threads=threads, repeats=repeats)
    base = outcomes[PLAIN].timing
    if base is None:
        raise RuntimeError(f"The plain step of {case.name} failed: {outcomes[PLAIN].error}")
    goal = TIME.get(case.name)
    return {
        "model": case.name,
        "title": case.title,
        "batch_size": size,
        "threads": threads,
        "clock": clock_for(threads)[0],
        "plain_ms": 1e3 * base.median,
        "target": goal.target if goal else None,
        "stretch": goal.stretch if goal else None,
        "candidates": {name: _figures(outcome, base.median) for name, outcome in outcomes.items()},
    }


def _figures(outcome: Outcome, base: float) -> dict[str, Any]:
    if outcome.timing is None:
        return {"error": outcome.error}
    return {
        "milliseconds": 1e3 * outcome.timing.median,
        "ratio": outcome.timing.median / base,
        "low": outcome.timing.low / base,
        "high": outcome.timing.high / base,
        "repeats": outcome.timing.repeats,
        "first_step": outcome.first / base,
        "engine": outcome.engine,
    }


def memory_row(case: Case, names: Sequence[str], *, size: int) -> dict[str, Any]:
    """One row of the result: every candidate's peak in bytes, or why it has none."""
    candidates: dict[str, Any] = {}
    for name in names:
        peak = measure_in_subprocess(case.name, name, size=size)
        measured = {"process": peak.process, "tensors": peak.tensors, "first": peak.first}
        candidates[name] = {"error": peak.error} if peak.error else measured
    return {"model": case.name, "title": case.title, "batch_size": size, "candidates": candidates}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="Opacus and torch.func")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--overhead", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--output", type=Path, default=RESULTS / "engines.json")
    parser.add_argument("--chart", type=Path, help="also draw the times here (.svg or .png)")
    parser.add_argument("--quick", action="store_true", help=f"batches of {QUICK_SIZE}; not written by default")
    parser.add_argument("--chunks", action="store_true", help="compare chunk sizes of vmap, and write nothing")
    return parser.parse_args()


def main() -> None:
    options = parse()
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    cases = [case for case in CASES if case.name in options.models]
    repeats = options.repeats
    if options.quick:
        cases = [replace(case, batch_size=min(QUICK_SIZE, case.batch_size)) for case in cases]
        repeats = min(repeats, QUICK_REPEATS)
    if options.chunks:
        _compare_chunks(console, cases, repeats)
        return

    path = None if options.quick and options.output == RESULTS / "engines.json" else options.output
    compared = [*options.engines, *(PEERS if options.peers else ())]
    names = [PLAIN, FLOOR, NOISE, *compared]
    record: dict[str, Any] = {
        "environment": environment((*PACKAGES, "opacus")),
        "repeats": repeats,
        "warm_up": WARM_UP,
        "time": [],
        "memory": [],
        "overhead": None,
    }
    for threads in options.threads:
        for case in cases:
            row = time_row(case, names, threads=threads, repeats=repeats, size=case.batch_size)
            record["time"].append(row)
            console.print(time_line(row), highlight=False)
            _write(record, path)
    if options.overhead:
        ours = [PLAIN, FLOOR, NOISE, *options.engines]
        record["overhead"] = time_row(OVERHEAD, ours, threads=1, repeats=OVERHEAD_REPEATS, size=1)
        _write(record, path)
    for case in cases if options.memory else []:
        row = memory_row(case, [PLAIN, *compared], size=case.batch_size)
        record["memory"].append(row)
        console.print(memory_line(row), highlight=False)
        _write(record, path)
    print_tables(console, record)
    if options.chart:
        draw_chart([row for row in record["time"] if row["threads"] == options.threads[0]], options.chart)


def _compare_chunks(console: Console, cases: Sequence[Case], repeats: int) -> None:
    rows = []
    names = [PLAIN, *(f"vmap/{chunk}" for chunk in CHUNK_SIZES)]
    for case in cases:
        row = time_row(case, names, threads=1, repeats=repeats, size=case.batch_size)
        rows.append(row)
        console.print(time_line(row), highlight=False)
    print_tables(console, {"time": rows, "memory": [], "overhead": None})


def _write(record: dict[str, Any], path: Path | None) -> None:
    """After each row, so that a run that is cut short leaves what it has."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
