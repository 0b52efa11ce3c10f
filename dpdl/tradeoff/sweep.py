"""`dpdl.sweep`: the same training at several privacy budgets, and what each of them costs in accuracy.

    result = dpdl.sweep(train, epsilons=(0.5, 1, 2, 4, 8), delta=1e-5, dataset_size=60_000, epochs=20,
                        max_grad_norms=(0.1, 1.0), batch_sizes=(512,), seeds=(0, 1, 2), jobs=4, output="sweep")
    result.plot("trade-off.png")

Each run is accounted by itself. Looking at many and keeping one is not free: `looking` has what it costs, `selection`
how to keep one for little.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from accountants import Repetitions, arguments
from dpdl.errors import ParameterError
from dpdl.execution import EngineName
from dpdl.plan import PrivacyPlan
from dpdl.tradeoff.grid import MOST_RUNS, Grid, HeldOut
from dpdl.tradeoff.journal import Journal
from dpdl.tradeoff.looking import epsilon_of_all, remarks_on_a_sweep
from dpdl.tradeoff.point import Point, Train
from dpdl.tradeoff.publish import CHOSEN, published, write_chosen
from dpdl.tradeoff.result import SweepResult
from dpdl.tradeoff.row import Row
from dpdl.tradeoff.selection import (
    Selection,
    best,
    draw,
    epsilon_of_selection,
    refuse_damaged_draw,
    runs_drawn,
    within_budget,
)
from dpdl.tradeoff.workers import refuse_what_cannot_travel, run_all

__all__ = ["CHOSEN", "RUNS", "SECRET", "run_grid", "sweep"]

RUNS, SECRET = "runs", "secret"
MOST_THREADS = 1024  # more than any machine serves; torch takes counts that no machine can start


def sweep(
    train: Train,
    *,
    delta: float,
    epsilons: Sequence[float] = (),
    plans: Sequence[PrivacyPlan] = (),
    dataset_size: int | None = None,
    epochs: int | None = None,
    max_grad_norms: Sequence[float] = (),
    batch_sizes: Sequence[int] = (),
    lrs: Sequence[float] = (),
    seeds: Sequence[int] = (0, 1, 2),
    baseline: bool | None = None,
    baseline_lrs: Sequence[float] = (),
    settings: Mapping[str, Any] | None = None,
    engine: EngineName = "auto",
    max_physical_batch_size: int | None = None,
    held_out: HeldOut = "private",
    insecure_seed: int | None = None,
    select: Repetitions | None = None,
    jobs: int = 1,
    threads: int | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: Console | None = None,
) -> SweepResult:
    """Train at each epsilon (or plan), with each clipping norm, batch size, learning rate and seed.

    Plans are computed from `epsilons`, `dataset_size`, `epochs` and `batch_sizes`; or given. Every argument is checked,
    and every plan made, before the first run begins.

    Args:
        train: called with a `Point` for each run; trains with `point.make_private` and returns an `Outcome`. With
            several jobs it must be importable in another process.
        delta, epsilons, plans, dataset_size, epochs, max_grad_norms, batch_sizes, lrs, seeds: as in `Grid`.
        baseline_lrs, settings, engine, max_physical_batch_size, held_out, insecure_seed: as in `Grid`.
        baseline: whether to add the non-private line; by default unless `select` is given.
        select: choose one run privately. Runs, a random number of them by this law, are drawn from the grid; the one
            with the largest score is returned, alone, with an epsilon that covers the choice. With `epsilons` it must
            be one: the budget of run and choice together.
        jobs: how many runs at once, each in a process of its own; 1 runs them in this one.
        threads: of torch in each run. Equal threads give equal sums: results do not depend on `jobs` then.
        output: a folder for what is done so far (`rows.jsonl`, after each run) and for what runs save.
        resume: go on with the sweep in `output`, if there is one. Finished rows are not repeated; failed ones are,
            but not in a private selection.
        progress: where to show a bar.

    Returns:
        The rows; with `select` the chosen one alone, and `selection`.

    Guarantee:
        Each row's epsilon is of that run alone. `epsilon_of_all` covers all private rows together, and any choice among
        them. With `select`, `selection.epsilon` covers the returned run and its choice, under the conditions that
        `remarks` names.

    Raises:
        ParameterError: an argument is out of range, or `train` cannot be loaded in another process.
        CheckpointError: `output` holds another sweep, or one and `resume` is False.
        KeyboardInterrupt: as usual; what is finished is kept in `output`.

    A run that raises is a row with `error`, and the others go on.
    """
    grid = Grid(
        epsilons=tuple(_listed("epsilons", epsilons)),
        plans=tuple(_listed("plans", plans)),
        dataset_size=dataset_size,
        epochs=epochs,
        delta=delta,
        max_grad_norms=tuple(_listed("max_grad_norms", max_grad_norms)),
        batch_sizes=tuple(_listed("batch_sizes", batch_sizes)),
        lrs=tuple(_listed("lrs", lrs)),
        seeds=tuple(_listed("seeds", seeds)),
        baseline=select is None if baseline is None else baseline,
        baseline_lrs=tuple(_listed("baseline_lrs", baseline_lrs)),
        settings={} if settings is None else settings,
        engine=engine,
        max_physical_batch_size=max_physical_batch_size,
        held_out=held_out,
        insecure_seed=insecure_seed,
    )
    folder = None if output is None else Path(output)
    return run_grid(
        train, grid, select=select, jobs=jobs, threads=threads, output=folder, resume=resume, progress=progress
    )


def run_grid(
    train: Train,
    grid: Grid,
    *,
    select: Repetitions | None,
    jobs: int,
    threads: int | None,
    output: Path | None,
    resume: bool,
    progress: Console | None,
    beside: Mapping[str, Any] | None = None,
) -> SweepResult:
    """`sweep` of a grid.

    Args:
        train, select, jobs, threads, output, resume, progress: as in `sweep`.
        grid: what to try.
        beside: what else the sweep is told apart by when it is resumed, as JSON holds it.
    """
    jobs = arguments.positive_whole("jobs", jobs, remedy="Give the number of processes.")
    if threads is not None:
        threads = arguments.positive_whole("threads", threads, remedy="Give the number of threads of each run.")
        if threads > MOST_THREADS:
            raise ParameterError(f"threads must be at most {MOST_THREADS:,}, got {threads}. Give fewer.")
    if not callable(train):
        raise ParameterError(f"train must be a function of a Point, got {type(train).__name__}.")
    if resume and output is None:
        raise ParameterError("resume=True needs the output folder of the sweep to go on with.")
    if jobs > 1:
        refuse_what_cannot_travel(train)
    asked = {**grid.to_dict(), "select": _law(select), "train": _name(train), **(beside or {})}
    if output is not None:
        output = output.resolve()
    if select is not None:
        return _select(train, grid, select, asked, jobs, threads, output, resume, progress)
    points = grid.points()
    with Journal(output, asked, resume=resume) as journal:
        done = {key for key, row in journal.rows.items() if not row.failed}
        folder = None if output is None else output / RUNS
        _run_missing(train, points, done, journal, folder, jobs, threads, progress, counted=True)
        begun, rows = dict(journal.begun), dict(journal.rows)
    private = [(point.plan, begun[point.key]) for point in points if point.private]
    epsilon = epsilon_of_all(private, delta=grid.delta)
    return SweepResult(
        rows=tuple(rows[point.key] for point in points),
        asked=asked,
        delta=grid.delta,
        epsilon_of_all=epsilon,
        remarks=remarks_on_a_sweep(grid, points, begun, epsilon),
    )


def _select(
    train: Train,
    grid: Grid,
    law: Repetitions,
    asked: Mapping[str, Any],
    jobs: int,
    threads: int | None,
    output: Path | None,
    resume: bool,
    progress: Console | None,
) -> SweepResult:
    _refuse_unproved_selection(grid, law)
    fitted = grid if grid.plans else within_budget(grid, law)
    candidates = fitted.points()
    plans = list(dict.fromkeys(point.plan for point in candidates))
    secret = None if output is None else output / SECRET
    with Journal(secret, asked, resume=resume, secret=True) as journal:
        drawn = journal.drawn(lambda: draw(len(candidates), law, grid.insecure_seed))
        refuse_damaged_draw(drawn, len(candidates))
        points = runs_drawn(candidates, drawn, grid.insecure_seed)
        folder = None if secret is None else secret / RUNS
        _run_missing(train, points, set(journal.rows), journal, folder, jobs, threads, progress, counted=False)
        found = best(points, journal.rows, drawn)
    epsilon = epsilon_of_selection(plans, law, delta=grid.delta)
    chosen = None
    if found is not None:
        target = grid.epsilons[0] if grid.epsilons else None
        chosen = published(found, epsilon=epsilon, target=target, mean=law.mean, candidates=len(candidates))
        if output is not None and folder is not None:
            saved = folder / found.key
            write_chosen(chosen, saved if saved.exists() else None, output / CHOSEN)
    selection = Selection(
        epsilon=epsilon,
        delta=grid.delta,
        epsilon_of_one_run=max(plan.epsilon(grid.delta) for plan in plans),
        mean=law.mean,
        shape=law.shape,
        candidates=len(candidates),
        chosen=chosen,
    )
    return SweepResult(
        rows=() if chosen is None else (chosen,),
        asked=asked,
        delta=grid.delta,
        epsilon_of_all=selection.epsilon,
        remarks=selection.remarks(grid),
        selection=selection,
    )


def _refuse_unproved_selection(grid: Grid, law: Repetitions) -> None:
    if not isinstance(law, Repetitions):
        raise ParameterError(
            f"select must be an accountants.Repetitions, got {law!r}. Give Repetitions(mean=20, shape=0.0)."
        )
    if grid.held_out != "public":
        raise ParameterError(
            "select needs held_out='public': the score decides what is published, and of secret records it would have "
            "to be private itself, which a plain score is not. Score on records that are no secret, and say so."
        )
    if grid.baseline:
        raise ParameterError("select goes without a non-private line, which is no part of the theorem: baseline=False.")


def _run_missing(
    train: Train,
    points: Sequence[Point],
    done: set[str],
    journal: Journal,
    folder: Path | None,
    jobs: int,
    threads: int | None,
    progress: Console | None,
    *,
    counted: bool,
) -> None:
    """Make the runs that are not done, and note each as it ends."""
    missing = [p if folder is None else replace(p, folder=folder / p.key) for p in points if p.key not in done]
    planned = {plan: plan.epsilon(points[0].delta) for plan in {point.plan for point in missing}}

    def begin(point: Point) -> None:
        journal.begin(point.key)
        if point.folder is not None:
            shutil.rmtree(point.folder, ignore_errors=True)  # of an attempt that was cut short
            point.folder.mkdir(parents=True)

    running = run_all(train, missing, jobs=jobs, threads=threads, begin=begin)
    bar = _bar(progress, len(points) if counted else None, len(points) - len(missing))
    with closing(running), bar as advance:
        for ended in running:
            plan = ended.point.plan
            row = Row.of(ended.point, ended.answer, planned_epsilon=planned[plan], seconds=ended.seconds)
            journal.finish(row)
            if ended.point.folder is not None and not any(ended.point.folder.iterdir()):
                ended.point.folder.rmdir()
            advance(row)


@contextmanager
def _bar(console: Console | None, total: int | None, done: int) -> Iterator[Any]:
    """Rows as they end; without a total where their number is a secret."""
    if console is None:
        yield lambda row: None
        return
    counts = (MofNCompleteColumn(), TextColumn("runs"), TimeRemainingColumn()) if total is not None else ()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *counts,
        TimeElapsedColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("sweep", total=total, completed=done, failed="")
        failures = 0

        def advance(row: Row) -> None:
            nonlocal failures
            failures += row.failed
            progress.update(task, advance=1, failed=f"{failures} failed" if failures else "")

        yield advance


def _listed(name: str, values: object) -> Sequence[Any]:
    if isinstance(values, (list, tuple, range)):
        if values[MOST_RUNS:]:
            raise ParameterError(f"{name} holds more than {MOST_RUNS:,} values. Give fewer.")
        return values
    raise ParameterError(f"{name} must be a list or tuple, got {values!r}. Give for example ({values!r},).")


def _law(law: Repetitions | None) -> dict[str, Any] | None:
    if law is None or not isinstance(law, Repetitions):
        return None
    return {"mean": law.mean, "shape": "inf" if law.shape == float("inf") else law.shape}


def _name(train: Train) -> str:
    """What the function is called, the same in another process."""
    named = getattr(train, "__qualname__", None)
    if named is not None:
        return f"{train.__module__}.{named}"
    kind = f"{type(train).__module__}.{type(train).__qualname__}"
    return kind if " at 0x" in repr(train) else repr(train)
