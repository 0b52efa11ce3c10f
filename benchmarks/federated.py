"""What federated learning reaches and costs on full MNIST, and how fast rounds are.

    DPDL_DATA=DIR python -m benchmarks.federated                          # DIR/mnist holds the four IDX files
    DPDL_DATA=DIR python -m benchmarks.federated --only speed --peer-python PEER/bin/python

Accuracy: two runs for each scheme, with secure noise. Ten clients with 6,000 images each, by label unevenly
(Dirichlet, alpha 1). What protects a whole client needs many of them, so those schemes are run on a thousand clients,
too. Epsilons are upper bounds at delta = 1e-5, of a record or of a client as the row says.

Speed: rounds a second in one process with one thread, without evaluation; the median over processes, each of which
times a few rounds after one that is not counted. The libraries take turns. pfl is run if `--peer-python` can import it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import RESULTS, environment
from benchmarks.federated_tasks import TASKS, images
from dpdl.federated.image_federation import FederationSettings, build_federation
from dpdl.federated.runner import run_federated
from dpdl.privacy_report import rounded_up

RUNS = 2

FEW = FederationSettings(
    clients=10,
    rounds=12,
    partition="dirichlet",
    alpha=1.0,
    minimum=500,
    model="papernot-cnn",
    local_steps=12,
    batch_size=64,
    lr=0.25,
    max_grad_norm=0.5,
    epsilon=3.0,
    client_epsilon=8.0,
    max_update_norm=0.5,
)
MANY = replace(
    FEW,
    clients=1000,
    rounds=30,
    client_rate=0.1,
    partition="iid",
    minimum=1,
    model="logistic",  # the noise's norm grows with the square root of the number of weights
    local_steps=3,
    batch_size=20,
    lr=0.3,
    epsilon=8.0,
    max_update_norm=1.0,
)
ACCURACY: dict[str, FederationSettings] = {
    "none, 10 clients": replace(FEW, scheme="none"),
    "record, 10 clients": replace(FEW, scheme="record", lr=1.0),
    "client, 10 clients": replace(FEW, scheme="client", epsilon=8.0),
    "local, 10 clients": replace(FEW, scheme="local", epsilon=8.0),
    "both, 10 clients": replace(FEW, scheme="both", lr=1.0),
    "none, 1000 clients": replace(MANY, scheme="none"),
    "client, 1000 clients": replace(MANY, scheme="client"),
    "local, 1000 clients": replace(MANY, scheme="local"),
}
SPEED = (
    *(("dpdl", scheme) for scheme in ("none", "client", "record", "local", "both")),
    *(("pfl", scheme) for scheme in ("none", "client")),
)


def accuracy_of(settings: FederationSettings, seed: int) -> dict[str, Any]:
    """One run from its own partition and first weights; noise is secure."""
    data = images()
    with tempfile.TemporaryDirectory() as folder:
        federation = build_federation(replace(settings, seed=seed), data, ledgers=Path(folder))
        began = time.process_time()
        run = run_federated(
            federation.server,
            federation.clients,
            rounds=settings.rounds,
            every=settings.rounds // 3,
            evaluate=federation.evaluate,
            delta=settings.delta,
            progress=Console(stderr=True),
        )
    last = run.history.rounds[-1]
    return {
        "seed": seed,
        "accuracy": (run.history.last_evaluation or {}).get("accuracy"),
        "client_epsilon": _shown(last.largest_epsilon),
        "server_epsilon": _shown(last.server_epsilon),
        "refusals": run.history.refusals,
        "cpu_seconds": round(time.process_time() - began, 1),
        "claims": [str(claim) for claim in run.report.claims],
        "history": [
            {"round": r.round, **(r.evaluation or {}), "largest_epsilon": _shown(r.largest_epsilon)}
            for r in run.history.rounds
            if r.evaluation
        ],
    }


def _shown(epsilon: float | None) -> float | str | None:
    return "inf" if epsilon is not None and math.isinf(epsilon) else epsilon


def accuracies(console: Console, only: str | None, save: Callable[[dict[str, Any]], None]) -> None:
    """All rows, saved as they come, and a table of them."""
    table = Table(title=f"MNIST, {RUNS} runs each")
    for column in ("scheme", "accuracy", "epsilon of a record", "epsilon of a client", "CPU s a run"):
        table.add_column(column)
    rows: dict[str, Any] = {}
    for name, settings in ACCURACY.items():
        if only is not None and only not in name:
            continue
        runs = [accuracy_of(settings, seed) for seed in range(RUNS)]
        rows[name] = {"settings": asdict(settings), "runs": runs}
        of_record = runs[-1]["client_epsilon"] if settings.scheme in ("record", "both") else None
        of_client = runs[-1]["client_epsilon"] if settings.scheme == "local" else runs[-1]["server_epsilon"]
        table.add_row(
            name,
            ", ".join(f"{run['accuracy']:.2%}" for run in runs),
            "-" if of_record is None else f"<= {rounded_up(of_record)}",
            "-" if of_client is None else f"<= {rounded_up(of_client)}",
            f"{statistics.median(run['cpu_seconds'] for run in runs):.0f}",
        )
        console.print(table)
        save(rows)


def speeds(console: Console, peer_python: str | None, processes: int) -> dict[str, Any]:
    """Median seconds a round by task, library and scheme."""
    found: dict[str, Any] = {}
    for task in TASKS:
        spans: dict[tuple[str, str], list[dict[str, list[float]]]] = {}
        for _ in range(processes):
            for library, scheme in SPEED:
                python = sys.executable if library == "dpdl" else peer_python
                if python is not None:
                    spans.setdefault((library, scheme), []).append(_timed(python, library, scheme, task))
        rows = {
            f"{library} {scheme}": {
                clock: statistics.median(second for timed in several for second in timed[clock])
                for clock in ("cpu", "elapsed")
            }
            for (library, scheme), several in spans.items()
        }
        table = Table(title=f"{task}: {TASKS[task]}")
        for column in ("library and scheme", "rounds a second", "CPU ms a round", "over dpdl none"):
            table.add_column(column)
        plain = rows["dpdl none"]["cpu"]
        for name, row in rows.items():
            table.add_row(name, f"{1 / row['elapsed']:.2f}", f"{1000 * row['cpu']:.0f}", f"{row['cpu'] / plain:.2f}")
        console.print(table)
        found[task] = {"task": asdict(TASKS[task]), "seconds_a_round": rows}
    return found


def _timed(python: str, library: str, scheme: str, task: str) -> dict[str, list[float]]:
    command = [python, "-m", "benchmarks.federated_worker", library, scheme, task]
    root = str(Path(__file__).parents[1])
    environ = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    spans: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])  # pfl prints its metrics before it
    return spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("accuracy", "speed"))
    parser.add_argument("--rows", help="accuracy rows whose name has this in it")
    parser.add_argument("--peer-python", help="a Python that has pfl")
    parser.add_argument("--processes", type=int, default=3, help="for each row of the speed table")
    parser.add_argument("--out", type=Path, default=RESULTS / "federated.json")
    arguments = parser.parse_args()
    if "DPDL_DATA" not in os.environ:
        parser.error("set DPDL_DATA to a folder that has mnist/ in it")
    torch.set_num_threads(1)
    console = Console()
    record: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if arguments.only != "speed":
        record["environment"] = environment()  # of the accuracies
    earlier = record.get("accuracy", {})

    def save(rows: dict[str, Any]) -> None:
        record["accuracy"] = {**earlier, **rows}
        arguments.out.parent.mkdir(exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")

    if arguments.only != "speed":
        accuracies(console, arguments.rows, save)
    if arguments.only != "accuracy":
        record["speed"] = {
            **speeds(console, arguments.peer_python, arguments.processes),
            "environment": environment(),
            "pfl": _version_of_pfl(arguments.peer_python),
        }
        save({})


def _version_of_pfl(python: str | None) -> str | None:
    if python is None:
        return None
    program = "import importlib.metadata as m; print(m.version('pfl'))"
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
