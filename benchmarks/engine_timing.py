"""Times of several steps of one model, taken in turns so that a busy machine slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.engine_candidates import build_step
from benchmarks.engine_models import Case
from benchmarks.engine_steps import Step

__all__ = ["WARM_UP", "Outcome", "Timing", "clock_for", "first_line", "measure"]

# Steps before the measured ones. dpdl checks the loss on batches 1 to 4, and on 8, 16, 32, ...: with seven
# measured steps after eight there is no check among them.
WARM_UP = 8
CHECKED = 4  # the first steps, which say nothing of how long the others take
SLOW = 2.0  # seconds; a slower candidate (loop, mostly) is measured sooner and less often
SLOW_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a step over its repeats."""

    median: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one candidate on one model.

    Attributes:
        timing: None if it could not run.
        first: seconds of its very first step.
        engine: what computes, where the candidate chooses.
        error: why it could not run; empty if it could.
    """

    timing: Timing | None = None
    first: float = 0.0
    engine: str | None = None
    error: str = ""


def clock_for(threads: int) -> tuple[str, Callable[[], float]]:
    """Process CPU time for one thread, which a busy machine changes least; wall time for more."""
    return ("process CPU", time.process_time) if threads == 1 else ("wall", time.perf_counter)


def measure(case: Case, names: Sequence[str], *, size: int, threads: int, repeats: int) -> dict[str, Outcome]:
    """Every candidate's times on one model and batch size, in the order of `names`."""
    torch.set_num_threads(threads)
    _, clock = clock_for(threads)
    outcomes: dict[str, Outcome] = {}
    steps: dict[str, Step] = {}
    for name in names:
        try:
            steps[name] = build_step(name, case, size)
            began = clock()
            steps[name].run()
            first = clock() - began
            _warm_up(steps[name], clock)
        except Exception as error:  # one that refuses a model is a result, and the others go on
            steps.pop(name, None)
            outcomes[name] = Outcome(error=first_line(error))
        else:
            outcomes[name] = Outcome(first=first, engine=steps[name].engine())
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats):
        for name, step in steps.items():
            if turn < SLOW_REPEATS or min(seconds[name]) < SLOW:
                began = clock()
                step.run()
                seconds[name].append(clock() - began)
    for name, times in seconds.items():
        timing = Timing(median=statistics.median(times), low=min(times), high=max(times), repeats=len(times))
        outcomes[name] = Outcome(timing=timing, first=outcomes[name].first, engine=outcomes[name].engine)
    return {name: outcomes[name] for name in names}


def _warm_up(step: Step, clock: Callable[[], float]) -> None:
    """Steps after the first, before the measured ones."""
    for taken in range(1, WARM_UP):
        began = clock()
        step.run()
        if taken >= CHECKED and clock() - began > SLOW:
            return


def first_line(error: Exception) -> str:
    """An error as one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
