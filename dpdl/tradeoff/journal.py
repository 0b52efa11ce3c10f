"""What a sweep has done so far, one line a fact, each on the disk before the next thing happens.

The first line says what was asked. A line `begun` is written before a run is made, so that a run whose sweep was killed
still counts among those that touched the data; a line `row` when it has ended. A file whose last line was cut off by
the end of the machine is read up to there.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from accountants import arguments
from dpdl.errors import CheckpointError
from dpdl.tradeoff.row import Row

__all__ = ["JOURNAL", "SCHEMA", "Journal", "asked_before"]

SCHEMA = "dpdl.sweep/1"
JOURNAL = "rows.jsonl"


class Journal:
    """Begun runs and finished rows of one sweep; in memory only if it has no folder.

    Args:
        folder: where the file is; made if need be.
        asked: the sweep's settings, as JSON holds them.
        resume: go on with the file, if there is one.
        secret: only the user who runs the sweep may read the folder.

    Raises:
        CheckpointError: there is a file and `resume` is False; or it is damaged, in use, or of another sweep.
    """

    def __init__(self, folder: Path | None, asked: Mapping[str, Any], *, resume: bool, secret: bool = False) -> None:
        self.rows: dict[str, Row] = {}
        self.begun: Counter[str] = Counter()
        self._drawn: dict[str, Any] | None = None
        self._file: BinaryIO | None = None
        if folder is None:
            return
        path = folder / JOURNAL
        try:
            if path.exists() and not resume:
                raise CheckpointError(
                    f"{folder} holds a sweep already. Go on with it by resume (--resume), or choose another output."
                )
            folder.mkdir(parents=True, exist_ok=True, mode=0o700 if secret else 0o777)
            self._file = path.open("ab")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{path} is in use: another process is at this sweep. Wait for it.") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error}. Choose another output.") from error
        try:
            lines, whole = _lines(path)
            if lines:
                _refuse_another(path, lines[0], asked)
            for line in lines[1:]:
                self._take(path, line)
        except CheckpointError:
            self._file.close()  # or this process would hold the lock for as long as anybody keeps the error
            raise
        self._file.truncate(whole)
        if not lines:
            self._append({"schema": SCHEMA, "asked": dict(asked)})

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def begin(self, key: str) -> None:
        """A run is about to be made."""
        self._append({"begun": key})
        self.begun[key] += 1

    def finish(self, row: Row) -> None:
        """A run has ended."""
        self._append({"row": row.to_dict()})
        self.rows[row.key] = row

    def drawn(self, draw: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was drawn at random for this sweep: once, however often it is resumed."""
        if self._drawn is None:
            self._drawn = draw()
            self._append({"drawn": self._drawn})
        return self._drawn

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(_encoded(line))
            self._file.flush()
            os.fsync(self._file.fileno())

    def _take(self, path: Path, line: Mapping[str, Any]) -> None:
        match line:
            case {"begun": str(key)}:
                self.begun[key] += 1
            case {"row": dict(values)}:
                row = Row.from_dict(values)
                self.rows[row.key] = row
            case {"drawn": dict(values)}:
                self._drawn = values
            case _:
                shown = arguments.shown(line)
                raise CheckpointError(f"{path} is damaged: a line is {shown}. Start anew in another output.")


def asked_before(folder: Path) -> dict[str, Any]:
    """The settings of the sweep in a folder.

    Raises:
        CheckpointError: there is none, or its file is damaged.
    """
    path = folder / JOURNAL
    if not path.exists():
        raise CheckpointError(f"There is no sweep to resume in {folder}: {path} is missing.")
    lines, _ = _lines(path)
    if not lines:
        raise CheckpointError(f"{path} is of no sweep of this version. Start anew in another output.")
    return _asked(path, lines[0])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Whole lines, and how many bytes they are; what follows the last line break was never finished."""
    found: list[dict[str, Any]] = []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Choose another output.") from error
    whole = content.rfind(b"\n") + 1
    for number, text in enumerate(content[:whole].splitlines(), start=1):
        try:
            line = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged in line {number}. Start anew in another output.") from error
        if not isinstance(line, dict):
            raise CheckpointError(f"{path} is damaged in line {number}. Start anew in another output.")
        found.append(line)
    return found, whole


def _asked(path: Path, first: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the first line."""
    if first.get("schema") != SCHEMA:
        shown = arguments.shown(first.get("schema"))
        raise CheckpointError(f"{path} is of schema {shown}, not {SCHEMA!r}. Start anew in another output.")
    asked = first.get("asked")
    if not isinstance(asked, dict):
        raise CheckpointError(f"{path} is damaged: its first line names no settings. Start anew in another output.")
    return asked


def _refuse_another(path: Path, first: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    before = _asked(path, first)
    differ = [name for name in {**before, **asked} if before.get(name) != asked.get(name)]
    if differ:
        listed = "; ".join(f"{name} was {before.get(name)!r}, now {asked.get(name)!r}" for name in differ)
        raise CheckpointError(
            f"The sweep in {path.parent} was asked otherwise: {listed}. Resume it with its own settings, or choose "
            "another output."
        )
