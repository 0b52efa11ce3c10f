"""Tightness, soundness and time of the accountants, beside dp_accounting, Opacus, prv_accountant and autodp.

    python -m benchmarks.accounting                                  # the rows kept with the tests; a few minutes
    python -m benchmarks.accounting --table TABLE.csv                # a table of certified epsilons
    python -m benchmarks.accounting --peers dp_accounting,opacus     # some of the peers
    python -m benchmarks.accounting --quick                          # a small run, nothing written

The table has columns id, spec_json (mechanisms with counts), adjacency, delta, eps_true_lo and eps_true_hi, which
enclose the tight epsilon. Peers that are not installed are named. Each engine runs in one process of its own, on one
thread, from empty caches for every query, with a limit on time and memory. Engines take turns; times are medians of
process CPU seconds, which a busy machine changes less than wall time. Compare ratios.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.accounting_engines import ENGINES
from benchmarks.accounting_report import Row, cases_table, misses_table, score, summary, summary_table
from benchmarks.environment import RESULTS, environment

PEERS = ("dp_accounting", "opacus", "prv_accountant", "autodp")
GOLDEN = Path(__file__).parent.parent / "tests" / "accountants" / "golden" / "certified_epsilon.json"
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
IMPORTS = {"autodp": "autodp.mechanism_zoo"}  # what a user imports, where the package itself is empty
ENOUGH_SECONDS = 10.0  # an engine that spent this long on a case is not asked again

STEP = {"mech": "poisson_gaussian", "q": 0.01, "sigma": 1.0}
ONE_QUERY = {
    "method": "epsilon",
    "arguments": {"mechanisms": [{**STEP, "count": 10_000}], "delta": 1e-5, "relation": "add_remove"},
}
CURVE = {
    "method": "curve",
    "arguments": {"sigma": 1.0, "q": 0.01, "steps": [100 * (i + 1) for i in range(100)], "delta": 1e-5},
}
MANY = [{"mech": "poisson_gaussian", "q": 0.02, "sigma": 1 + 2 * i / 999, "count": 1} for i in range(1000)]
CASES: dict[str, dict[str, Any]] = {
    "one query": ONE_QUERY,
    "delta at epsilon 6": {
        "method": "delta",
        "arguments": {"mechanisms": [{**STEP, "count": 10_000}], "epsilon": 6.0},
    },
    "noise multiplier for epsilon 3": {
        "method": "noise_multiplier",
        "arguments": {"epsilon": 3.0, "delta": 1e-5, "q": 0.01, "steps": 10_000},
    },
    "curve of 100 points": CURVE,
    "the curve after a first query": {**CURVE, "before": ONE_QUERY},
    "1000 noise multipliers": {
        "method": "epsilon",
        "arguments": {"mechanisms": MANY, "delta": 1e-6, "relation": "add_remove"},
    },
}
OURS_ONLY = ("the curve after a first query",)  # no peer keeps anything between queries
QUICK_CASES = ("one query", "delta at epsilon 6")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run measures.

    Attributes:
        limit_s: wall seconds that an engine has for one speed case.
        row_limit_s: and for one row of the table.
        repeats: of each speed case, for the median.
        row_repeats: of our engines on each row; peers answer once.
    """

    limit_s: float = 60.0
    row_limit_s: float = 10.0
    repeats: int = 5
    row_repeats: int = 3


class Worker:
    """One engine in a process that is replaced when it runs out of time or dies."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The worker's answer, or one of status "timeout" or "failed"."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        process = self._process or self._started()
        assert process.stdin is not None
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
        line = self._line(process, limit_s)
        if line:
            return json.loads(line)
        status, text = ("timeout", f"> {limit_s:g} s") if line is None else ("failed", "the process ended")
        self.close()
        return {"status": status, "text": text, "lower": None, "upper": None, "warnings": []}

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.accounting_worker", self.engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **ONE_THREAD},
            bufsize=0,
        )
        self._process = process
        if not self._line(process, 60.0):
            self.close()
            raise RuntimeError(f"the process of {self.engine!r} did not start. Import its package to see why.")
        return process

    def _line(self, process: subprocess.Popen[bytes], limit_s: float) -> bytes | None:
        """One line; empty if the process has ended, None if time has run out."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], limit_s)
        return process.stdout.readline() if ready else None


def certified_rows(table: Path | None) -> list[Row]:
    """The rows of the table, or those kept with the tests."""
    if table is None:
        return [
            Row(
                id=row["id"],
                mechanisms=row["mechanisms"],
                relation="add_remove",
                delta=row["delta"],
                low=row["epsilon_low"],
                high=row["epsilon_high"],
            )
            for row in json.loads(GOLDEN.read_text())["rows"]
        ]
    with table.open(newline="") as file:
        return [
            Row(
                id=row["id"],
                mechanisms=json.loads(row["spec_json"]),
                relation=row["adjacency"],
                delta=float(row["delta"]),
                low=float(row["eps_true_lo"]),
                high=float(row["eps_true_hi"]),
            )
            for row in csv.DictReader(file)
        ]


def measure_rows(rows: Sequence[Row], workers: Sequence[Worker], settings: Settings) -> list[dict[str, Any]]:
    """Every engine's answer to every row, scored against the truth."""
    results = []
    for row in rows:
        job = {
            "method": "epsilon",
            "arguments": {"mechanisms": row.mechanisms, "delta": row.delta, "relation": row.relation},
        }
        for worker in workers:
            repeats = settings.row_repeats if _is_ours(worker) else 1
            answers = [worker.ask(job, settings.row_limit_s) for _ in range(repeats)]
            results.append(score(row, worker.engine, _median(answers)))
        _progress(f"row {row.id}")
    return results


def measure_cases(names: Sequence[str], workers: Sequence[Worker], settings: Settings) -> dict[str, dict[str, Any]]:
    """Median seconds of every engine on every speed case, the engines taking turns."""
    table: dict[str, dict[str, Any]] = {}
    for name in names:
        answers: dict[str, list[dict[str, Any]]] = {worker.engine: [] for worker in workers}
        for _ in range(settings.repeats):
            for worker in workers:
                done = answers[worker.engine]
                if name in OURS_ONLY and not _is_ours(worker):
                    continue
                if all(a["status"] == "ok" for a in done) and sum(a["wall_s"] for a in done) < ENOUGH_SECONDS:
                    done.append(worker.ask(CASES[name], settings.limit_s))
        table[name] = {engine: _median(done) for engine, done in answers.items() if done}
        _progress(name)
    return table


def import_seconds(packages: Sequence[str], repeats: int) -> dict[str, float]:
    """Median CPU seconds of importing each package in a new process, the interpreter's own start left out."""
    seconds: dict[str, list[float]] = {package: [] for package in packages}
    for _ in range(repeats):
        for package, times in seconds.items():
            module = IMPORTS.get(package, package)
            code = f"import time; c = time.process_time(); import {module}; print(time.process_time() - c)"
            run = subprocess.run(
                [sys.executable, "-c", code], env={**os.environ, **ONE_THREAD}, capture_output=True, check=True
            )
            times.append(float(run.stdout.split()[-1]))
    return {package: statistics.median(times) for package, times in seconds.items()}


def _is_ours(worker: Worker) -> bool:
    return ENGINES[worker.engine][0].package == "accountants"


def _median(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last answer, with median seconds; the first that is not "ok", if any."""
    for answer in answers:
        if answer["status"] != "ok":
            return answer
    seconds = {key: statistics.median(a[key] for a in answers) for key in ("cpu_s", "wall_s")}
    return {**answers[-1], **seconds, "repeats": len(answers)}


def _progress(text: str) -> None:
    print(f"\r{time.strftime('%H:%M:%S')} {text:<40}", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="CSV of certified epsilons (default: the tests' rows)")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"comma-separated, of {', '.join(PEERS)}")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/accounting.json; none with --quick")
    parser.add_argument("--limit", type=float, default=Settings.limit_s, help="seconds for a speed case")
    parser.add_argument("--row-limit", type=float, default=Settings.row_limit_s, help="seconds for a row")
    parser.add_argument("--quick", action="store_true", help="the tests' rows, two speed cases, once each")
    options = parser.parse_args()
    asked = [name for name in options.peers.split(",") if name]
    unknown = sorted(set(asked) - set(PEERS))
    if unknown:
        parser.error(f"unknown peers {', '.join(unknown)}; choose of {', '.join(PEERS)}")
    missing = [name for name in asked if importlib.util.find_spec(name) is None]
    packages = ["accountants", *(name for name in asked if name not in missing)]
    settings = Settings(limit_s=options.limit, row_limit_s=options.row_limit)
    if options.quick:
        settings = Settings(limit_s=10.0, row_limit_s=5.0, repeats=1, row_repeats=1)

    began, load = time.perf_counter(), os.getloadavg()
    workers = [Worker(name) for name, (kind, _) in ENGINES.items() if kind.package in packages]
    try:
        rows = measure_rows(certified_rows(options.table), workers, settings)
        cases = measure_cases(QUICK_CASES if options.quick else tuple(CASES), workers, settings)
    finally:
        for worker in workers:
            worker.close()
    record = {
        "environment": environment(("numpy", "scipy", *(name.replace("_", "-") for name in asked))),
        "settings": asdict(settings),
        "load_average": {"before": load, "after": os.getloadavg()},
        "seconds": time.perf_counter() - began,
        "missing": missing,
        "import_cpu_s": import_seconds(packages, 1 if options.quick else settings.repeats),
        "cases": cases,
        "summary": summary(rows),
        "rows": rows,
    }
    print(file=sys.stderr)
    for name in missing:
        print(f"{name} is not installed: left out.")
    print(misses_table(rows), cases_table(cases, record["import_cpu_s"]), summary_table(record["summary"]), sep="\n\n")
    output = options.output or (None if options.quick else RESULTS / "accounting.json")
    if output is not None:
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
