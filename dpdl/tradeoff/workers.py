"""The runs of a sweep, one after another here, or side by side in processes of their own.

A process is started afresh (spawn): it shares no random numbers, threads or memory with this one. It ends with this
one, however that ends, and a process that dies takes one run with it, not the sweep.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from dpdl.errors import ParameterError
from dpdl.tradeoff.point import Outcome, Point, Train

__all__ = ["Ended", "processors", "refuse_what_cannot_travel", "run_all"]

PATIENCE = 10.0  # seconds for a process to end by itself before it is killed
_GUARD = (
    "It must be defined at the top level of a module that can be imported without starting the sweep again: in a "
    'script, below `if __name__ == "__main__":` call sweep, above it define the function. Or give jobs=1.'
)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run that ended: with an outcome, or with the error as text."""

    point: Point
    answer: Outcome | str
    seconds: float


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def refuse_what_cannot_travel(train: Train) -> None:
    """Check that a function can be sent to another process.

    Raises:
        ParameterError: it cannot.
    """
    try:
        pickle.dumps(train)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ParameterError(f"train cannot be sent to another process ({error}). {_GUARD}") from error


def run_all(
    train: Train, points: Sequence[Point], *, jobs: int, threads: int | None, begin: Callable[[Point], None]
) -> Generator[Ended, None, None]:
    """Make every run, and yield each as it ends.

    Args:
        train: the user's function.
        points: the runs, begun in this order.
        jobs: how many at once; 1 runs them in this process.
        threads: of torch in each run; by default this process's, or as many as there are processors for each job.
        begin: called before a run is begun.

    Raises:
        ParameterError: the function cannot be loaded in another process.
    """
    if jobs == 1:
        yield from _one_by_one(train, points, threads, begin)
    else:
        yield from _side_by_side(train, points, jobs, threads or max(1, processors() // jobs), begin)


def _one_by_one(
    train: Train, points: Sequence[Point], threads: int | None, begin: Callable[[Point], None]
) -> Generator[Ended, None, None]:
    before = torch.get_num_threads()
    for point in points:
        begin(point)
        try:
            torch.set_num_threads(threads or before)
            with torch.random.fork_rng():
                ended = _run(train, point)
        finally:
            torch.set_num_threads(before)
        yield ended


def _run(train: Train, point: Point) -> Ended:
    torch.manual_seed(point.seed)
    began = time.monotonic()
    answer: Outcome | str
    try:
        answer = train(point)
        if not isinstance(answer, Outcome):
            answer = f"the function returned {type(answer).__name__}, not dpdl.tradeoff.Outcome(score=..., report=...)"
    except Exception as error:  # whatever a user's function may raise: it ends this run, not the others
        frame = traceback.extract_tb(error.__traceback__)[-1]
        answer = f"{type(error).__name__}: {error} ({os.path.basename(frame.filename)}, line {frame.lineno})"
    return Ended(point=point, answer=answer, seconds=time.monotonic() - began)


def _side_by_side(
    train: Train, points: Sequence[Point], jobs: int, threads: int, begin: Callable[[Point], None]
) -> Generator[Ended, None, None]:
    waiting = list(reversed(points))
    workers: list[_Worker] = []
    try:
        workers += [_Worker(train, threads) for _ in range(min(jobs, len(points)))]
        for worker in workers:
            worker.await_ready()
        while waiting or any(worker.point for worker in workers):
            for worker in workers:
                if waiting and worker.point is None:
                    point = waiting.pop()
                    begin(point)
                    worker.give(point)
            busy = {worker.connection: worker for worker in workers if worker.point}
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                ended = worker.take()
                if not worker.alive:
                    workers.remove(worker)
                    if waiting:
                        workers.append(_Worker(train, threads))
                        workers[-1].await_ready()
                yield ended
        for worker in workers:
            worker.dismiss()
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """One process, and the run that it is at."""

    def __init__(self, train: Train, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(
            target=_work, args=(theirs, pickle.dumps(train), threads), daemon=True
        )
        self._process.start()
        theirs.close()  # so that the end of the process is seen here as the end of what it sends
        self.point: Point | None = None
        self.alive = True
        self._began = 0.0

    def await_ready(self) -> None:
        """Wait until the process has loaded the function."""
        try:
            problem = self.connection.recv()
        except EOFError:
            self._process.join(PATIENCE)
            problem = f"the process ended with exit code {self._process.exitcode}"
        if problem is not None:
            raise ParameterError(f"train cannot be loaded in another process: {problem}. {_GUARD}")

    def give(self, point: Point) -> None:
        """Begin a run."""
        self.point, self._began = point, time.monotonic()
        try:
            self.connection.send(point)
        except OSError:
            self.alive = False  # it died while idle; `take` says so

    def take(self) -> Ended:
        """The run that has ended; whether the process has ended too is in `alive`."""
        point, self.point = self.point, None
        assert point is not None
        try:
            answer, seconds = self.connection.recv()
            return Ended(point=point, answer=answer, seconds=seconds)
        except (EOFError, ConnectionResetError):
            self.alive = False
            self._process.join(PATIENCE)
            why = f"the run's process ended with exit code {self._process.exitcode}"
            if self._process.exitcode == -signal.SIGKILL:
                why += " (killed; perhaps for want of memory: try fewer jobs)"
            return Ended(point=point, answer=why, seconds=time.monotonic() - self._began)

    def dismiss(self) -> None:
        """Let an idle process end by itself."""
        try:
            self.connection.send(None)
        except OSError:
            return
        self._process.join(PATIENCE)

    def end(self) -> None:
        """End the process, whatever it is at."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join(PATIENCE)
        self.connection.close()


def _work(connection: Connection, train: bytes, threads: int) -> None:
    """What runs in the process: runs as they come, until None does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of the terminal's; the first process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        function: Train = pickle.loads(train)
    except (AttributeError, ImportError, pickle.UnpicklingError) as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(None)
    while (point := connection.recv()) is not None:
        ended = _run(function, point)
        connection.send((ended.answer, ended.seconds))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
