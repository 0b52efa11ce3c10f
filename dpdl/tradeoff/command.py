"""`dpdl sweep`: what privacy costs in accuracy, on images or a table, as a table, CSV, JSON and a plot."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from accountants import Repetitions
from dpdl.errors import DataError, ParameterError
from dpdl.models import MODEL_NAMES
from dpdl.tradeoff.cases import Case, Features
from dpdl.tradeoff.grid import MOST_RUNS, Grid, HeldOut
from dpdl.tradeoff.journal import JOURNAL, asked_before
from dpdl.tradeoff.result import SweepResult, written
from dpdl.tradeoff.saved import refuse_damaged_settings
from dpdl.tradeoff.sweep import CHOSEN, RUNS, SECRET, run_grid
from dpdl.tradeoff.tables import TABLES
from dpdl.tradeoff.workers import processors
from dpdl.train_command import EXIT_STOPPED

__all__ = ["register"]

PLOT = "trade-off.png"
EXIT_FAILED = 2
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
SELECT_EPSILON = 3.0  # of a private selection, which has one budget
DELTA = 1e-5
EPOCHS = 20
MAX_GRAD_NORM = 0.1
LR = 5.0  # with gradients clipped to 0.1; as they are, a tenth of it
BASELINE_LR = 0.5
BATCHES_A_PASS = 8  # large batches waste the least of a budget
SEEDS = 3
LAWS = {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}

EXAMPLES = """examples:
  dpdl sweep                                            the embedded digits at epsilon 0.5, 1, 2, 4 and 8
  dpdl sweep --epsilon 1 3 --max-grad-norm 0.05 0.1 0.5 --seeds 5
  dpdl sweep --data mnist/ --batch-size 4096            MNIST from its IDX files
  dpdl sweep --data cifar-10-python.tar.gz              CIFAR-10 on fixed features
  dpdl sweep --data mnist/ --features none --model papernot-cnn --lr 0.5 --baseline-lr 0.05
  dpdl sweep --table breast-cancer                      a table that scikit-learn carries
  dpdl sweep --resume --output dpdl-sweep               go on after Ctrl-C
  dpdl sweep --epsilon 3 --max-grad-norm 0.05 0.1 0.5 --select 10      choose one run privately, within epsilon 3
"""


def register(subparsers: Any) -> None:
    """Add the command to an argparse parser's subparsers."""
    parser = subparsers.add_parser(
        "sweep",
        help="train at several privacy budgets, and see what each costs",
        description="Train a classifier at several privacy budgets with several seeds, and show accuracy over epsilon "
        "beside the non-private line; or, with --select, choose one run privately.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", metavar="PATH", help="MNIST IDX files, CIFAR-10, or images by class, as for dpdl train; without it, "
        "the digits that the extra 'demo' brings")  # fmt: skip
    add("--table", choices=tuple(TABLES), help="a table that scikit-learn carries (extra 'tables'), instead of images")
    add("--features", choices=get_args(Features), help="of images (default: oriented-gradients, fixed features that "
        "cost no privacy)")  # fmt: skip
    add("--model", choices=MODEL_NAMES, help="(default: logistic)")
    shown = " ".join(f"{epsilon:g}" for epsilon in EPSILONS)
    add("--epsilon", type=float, nargs="+", metavar="E", help=f"budgets of single runs (default: {shown}); with "
        f"--select one, of run and choice together (default: {SELECT_EPSILON:g})")  # fmt: skip
    add("--delta", type=float, help=f"(default: {DELTA:g})")
    add("--max-grad-norm", type=float, nargs="+", metavar="C", help=f"clipping norms (default: {MAX_GRAD_NORM:g})")
    add(
        "--batch-size", type=int, nargs="+", metavar="N", help="expected examples in a step (default: an eighth of all)"
    )
    add("--lr", type=float, nargs="+", help=f"learning rates (default: {LR:g})")
    add("--epochs", type=int, help=f"(default: {EPOCHS})")
    add("--seeds", type=int, metavar="N", help=f"how many seeds of first weights (default: {SEEDS})")
    add("--no-baseline", action="store_true", default=None, help="leave out the non-private line")
    add(
        "--baseline-lr", type=float, nargs="+", metavar="LR", help=f"of the non-private line (default: {BASELINE_LR:g})"
    )
    add("--held-out", choices=get_args(HeldOut), help="whether the records that scores are of are secret (default: "
        "public for what the package carries, else private)")  # fmt: skip
    add("--select", type=float, metavar="MEAN", help="choose one run privately, out of a random number of runs with "
        "this mean, drawn from the grid")  # fmt: skip
    add("--select-law", choices=tuple(LAWS), help="of that number (default: logarithmic, the cheapest)")
    add("--max-physical-batch-size", type=int, metavar="N", help="most examples in memory at once")
    add("--jobs", type=int, metavar="N", help="runs at once (default: one for each processor)")
    add("--threads", type=int, metavar="N", help="of torch in each run (default: processors / jobs)")
    add(
        "--output", metavar="DIR", type=Path, default=Path("dpdl-sweep"), help="where results go (default: %(default)s)"
    )
    add("--resume", action="store_true", help="go on with the sweep in --output, with its settings")
    add("--insecure-seed", type=int, metavar="SEED", help="reproducible noise; for research only, the results say so")
    add("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command; the exit code."""
    messages = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    output: Path = arguments.output
    before = _saved(output) if arguments.resume else None
    case = _case(arguments, before)
    with messages.status("Reading data"):
        task = case.task()
    messages.print(str(task))
    grid = _grid(arguments, before, case, dataset_size=len(task.train_labels))
    try:
        result = run_grid(
            case,
            grid,
            select=_law(arguments, before),
            jobs=processors() if arguments.jobs is None else arguments.jobs,
            threads=arguments.threads,
            output=output,
            resume=arguments.resume,
            progress=messages,
            beside={"case": asdict(case)},
        )
    except KeyboardInterrupt:
        messages.print(f"Stopped; finished runs are kept. Go on with: {_again(output)}")
        return EXIT_STOPPED
    names = written(result, output)
    names += _plotted(result, output, task.name, messages)
    _close(result, output, names, messages)
    if arguments.json:
        sys.stdout.write(result.to_json() + "\n")
    else:
        Console(markup=False).print(result.table(), highlight=False)
    return EXIT_FAILED if result.failed or (result.selection is not None and not result.rows) else 0


def _plotted(result: SweepResult, output: Path, name: str, messages: Console) -> list[str]:
    if result.selection is not None:
        return []
    try:
        result.plot(output / PLOT, title=f"What privacy costs: {name}", score="accuracy on held-out records")
    except (DataError, ParameterError) as error:
        messages.print(f"No plot was written. {error}")
        return []
    return [PLOT]


def _close(result: SweepResult, output: Path, names: list[str], messages: Console) -> None:
    if result.selection is None:
        messages.print(f"Written to {output}: {', '.join([*names, JOURNAL, RUNS + '/'])}")
        for row in result.failed:
            messages.print(f"Failed: {row.key}: {row.error}")
        if result.failed:
            messages.print(f"{len(result.failed)} runs failed. Once the cause is mended: {_again(output)}")
        return
    if result.rows:
        names.append(f"{CHOSEN}/")
    else:
        messages.print(f"Nothing was chosen: no run was drawn, or all failed ({SECRET}/{JOURNAL} has why).")
    messages.print(f"Written to {output}: {', '.join(names)}. Publish none of {SECRET}/.")


def _again(output: Path) -> str:
    return f"dpdl sweep --resume --output {shlex.quote(str(output))}"


def _saved(output: Path) -> dict[str, Any]:
    """The settings of the sweep that is to be resumed."""
    folder = output / SECRET if (output / SECRET / JOURNAL).exists() else output
    before = asked_before(folder)
    refuse_damaged_settings(before, folder / JOURNAL)
    return before


def _case(arguments: argparse.Namespace, before: dict[str, Any] | None) -> Case:
    names = {f.name for f in fields(Case)}
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return Case(**{**({} if before is None else before["case"]), **given})


def _grid(arguments: argparse.Namespace, before: dict[str, Any] | None, case: Case, *, dataset_size: int) -> Grid:
    """What was given, beside the saved settings or the defaults."""
    given = {
        "epsilons": arguments.epsilon,
        "delta": arguments.delta,
        "max_grad_norms": arguments.max_grad_norm,
        "batch_sizes": arguments.batch_size,
        "lrs": arguments.lr,
        "epochs": arguments.epochs,
        "seeds": None if arguments.seeds is None else _seeds(arguments.seeds),
        "baseline": None if arguments.no_baseline is None else False,
        "baseline_lrs": arguments.baseline_lr,
        "held_out": arguments.held_out,
        "max_physical_batch_size": arguments.max_physical_batch_size,
        "insecure_seed": arguments.insecure_seed,
    }
    values = {name: value for name, value in given.items() if value is not None}
    if before is not None:
        saved = {f.name: before[f.name] for f in fields(Grid)}
        return Grid(**{**saved, **values, "dataset_size": dataset_size})
    select = arguments.select is not None
    baseline = not select and values.get("baseline", True)
    defaults: dict[str, Any] = {
        "epsilons": (SELECT_EPSILON,) if select else EPSILONS,
        "delta": DELTA,
        "max_grad_norms": (MAX_GRAD_NORM,),
        "batch_sizes": (max(1, dataset_size // BATCHES_A_PASS),),
        "lrs": (LR,),
        "epochs": EPOCHS,
        "seeds": tuple(range(SEEDS)),
        "baseline_lrs": (BASELINE_LR,) if baseline else (),
        "held_out": "public" if case.data is None else "private",
        "settings": {},
    }
    return Grid(**{**defaults, **values, "baseline": baseline, "dataset_size": dataset_size})


def _seeds(count: int) -> tuple[int, ...]:
    if count > MOST_RUNS:
        raise ParameterError(f"--seeds must be at most {MOST_RUNS:,}, got {count}. Give for example 3.")
    return tuple(range(count))


def _law(arguments: argparse.Namespace, before: dict[str, Any] | None) -> Repetitions | None:
    saved = None if before is None else before["select"]
    mean, law = arguments.select, arguments.select_law
    if saved is not None:
        shape = float(saved["shape"]) if law is None else LAWS[law]
        return Repetitions(mean=saved["mean"] if mean is None else mean, shape=shape)
    if mean is not None:
        return Repetitions(mean=mean, shape=LAWS[law or "logarithmic"])
    if law is not None:
        raise ParameterError("--select-law is of --select; give its mean as well.")
    return None
