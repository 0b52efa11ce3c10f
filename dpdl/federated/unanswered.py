"""Rounds that were begun and not answered: that one was not is told without noise, so it is never forgotten.

A server chooses the weights, so it can try to make a round fail where the data have something, and go well where they
do not. No noise covers that. The rule is one for all reasons: before a round touches data it leaves a mark, and the
mark goes when its answer is kept. A mark that is left, by an error, a kill -9 or a loop that did not take its steps,
is a round that the data may have ended, until the data's owner has looked:

    client.go_on()                                       # answer again; what was told was told, and no claim holds
    client.go_on(not_the_data="power cut of 3 May")      # the owner's word, which the report then cites

Marks are about the data, as the ledger is. Beside a ledger file there is a folder of them, shared by whoever shares the
file; a round under way holds a lock on its mark, which the system takes away when the process dies. Beside a ledger in
memory they are in memory. Whoever deletes the folder has forgotten, as with the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final
from weakref import WeakKeyDictionary

from dpdl.errors import LedgerError, ParameterError, StepError
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile

__all__ = ["Mark", "Unanswered", "UnansweredRounds", "unanswered_rounds_of"]

_FOLDER = ".unanswered"  # after the ledger's name
_BEGUN, _SEEN, _EXCUSED = ".begun", ".seen", ".excused"


@dataclass
class Mark:
    """A round under way; whoever runs it says when what leaves has its noise."""

    answered: bool = False


@dataclass(frozen=True, kw_only=True)
class Unanswered:
    """What is known of rounds that were begun and not answered; those under way are not among them.

    Attributes:
        new: that the owner has not looked at.
        seen: that the owner has looked at, and says nothing of.
        excused: for each of the others, the owner's word why it was not the data.
    """

    new: int = 0
    seen: int = 0
    excused: tuple[str, ...] = ()

    @property
    def why_not(self) -> str:
        """What ends a claim; "" if nothing does."""
        count = self.new + self.seen
        if not count:
            return ""
        rounds = f"{count} round{' was' if count == 1 else 's were'} begun and not answered"
        return f"{rounds}: whether one is answered is told without noise, and the data may have decided it"

    @property
    def assumption(self) -> str:
        """What a claim rests on, if nothing ends it."""
        said = "whether a round is answered is not decided by the data"
        if not self.excused:
            return f"{said} (all were)"
        reasons = "; ".join(dict.fromkeys(repr(reason) for reason in self.excused))
        return f"{said}: {len(self.excused)} were not, which the owner puts down to {reasons}"


class UnansweredRounds(ABC):
    """Marks of rounds on one ledger's data."""

    @abstractmethod
    def under_way(self, run: str) -> contextlib.AbstractContextManager[Mark]:
        """Leave a mark, which is on the disk before the first statement within; it goes with the last if
        `Mark.answered` was set.

        Args:
            run: the round's name in the ledger, for the owner.

        Raises:
            LedgerError: it cannot be written.
        """

    @abstractmethod
    def look(self) -> Unanswered:
        """What there is, other processes' marks included."""

    @abstractmethod
    def _settle(self, excuse: str | None) -> None:
        """Have the owner's word on all that `look` calls new, and with an excuse on those seen."""

    def go_on(self, *, not_the_data: str | None = None) -> None:
        """The owner has looked.

        Args:
            not_the_data: why neither the data nor weights that somebody sent had a part in it.

        Raises:
            ParameterError: the reason is not one line of text.
        """
        if not_the_data is not None and not (
            isinstance(not_the_data, str) and not_the_data.strip() and not_the_data.isprintable()
        ):
            raise ParameterError(
                f"not_the_data must be one line that says what it was, got {not_the_data!r}. Leave it out if you do "
                "not know."
            )
        self._settle(not_the_data)

    def refuse_to_go_on(self, max_failures: int) -> None:
        """Raise if max_failures rounds, or more, wait for the owner.

        Raises:
            StepError: they do.
        """
        if self.look().new >= max_failures:
            raise StepError(
                "This client answers no more rounds, because some were begun and not answered. Its owner looks at its "
                "log, and calls go_on()."
            )


@final
class _InMemory(UnansweredRounds):
    def __init__(self) -> None:
        self._new = self._seen = 0
        self._excused: list[str] = []

    @contextlib.contextmanager
    def under_way(self, run: str) -> Iterator[Mark]:
        mark = Mark()
        try:
            yield mark
        finally:
            self._new += not mark.answered

    def look(self) -> Unanswered:
        return Unanswered(new=self._new, seen=self._seen, excused=tuple(self._excused))

    def _settle(self, excuse: str | None) -> None:
        self._seen, self._new = self._seen + self._new, 0
        if excuse is not None:
            self._excused += [excuse] * self._seen
            self._seen = 0


@final
class _InFolder(UnansweredRounds):
    def __init__(self, ledger: Path) -> None:
        self._ledger = ledger
        self._folder = ledger.with_name(f"{ledger.name}{_FOLDER}")

    @contextlib.contextmanager
    def under_way(self, run: str) -> Iterator[Mark]:
        name, mark = secrets.token_hex(8), Mark()
        draft, file = self._folder / f".{name}", self._folder / f"{name}{_BEGUN}"
        with self._says():
            if not self._folder.exists():
                self._folder.mkdir(exist_ok=True)
                _on_disk(self._folder.parent)
            handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            with self._says():
                fcntl.flock(handle, fcntl.LOCK_EX)
                os.write(handle, f"{run}\n".encode())
                os.fsync(handle)
                draft.rename(file)  # locked before anybody sees it
                _on_disk(self._folder)
            yield mark
        finally:
            with self._says():
                if mark.answered:
                    file.unlink()
                fcntl.flock(handle, fcntl.LOCK_UN)  # whoever was forked meanwhile has it open, too
                os.close(handle)

    def look(self) -> Unanswered:
        with self._says():
            names = [] if not self._folder.exists() else sorted(os.listdir(self._folder))
            return Unanswered(
                new=sum(name.endswith(_BEGUN) and _is_left(self._folder / name) for name in names),
                seen=sum(name.endswith(_SEEN) for name in names),
                excused=tuple((self._folder / name).read_text().strip() for name in names if name.endswith(_EXCUSED)),
            )

    def _settle(self, excuse: str | None) -> None:
        with self._says():
            for name in sorted(os.listdir(self._folder)) if self._folder.exists() else ():
                file = self._folder / name
                if not (name.endswith(_BEGUN) and _is_left(file)) and not (excuse and name.endswith(_SEEN)):
                    continue
                if excuse is None:
                    file.rename(file.with_suffix(_SEEN))
                    continue
                draft = self._folder / f".{name}"
                with draft.open("w") as written:
                    written.write(f"{excuse}\n")
                    written.flush()
                    os.fsync(written.fileno())
                draft.rename(file.with_suffix(_EXCUSED))
                file.unlink()  # last: killed in between, it counts still
            if self._folder.exists():
                _on_disk(self._folder)

    @contextlib.contextmanager
    def _says(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LedgerError(
                f"The marks of rounds beside the ledger {self._ledger} cannot be kept in {self._folder}: "
                f"{error.strerror}. They are what tells rounds that failed: make the folder writable."
            ) from error


def _is_left(file: Path) -> bool:
    """Whether nobody holds the mark any more, and it is there."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.fstat(handle).st_nlink > 0
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


def _on_disk(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_of_ledgers_in_memory: WeakKeyDictionary[Ledger, _InMemory] = WeakKeyDictionary()


def unanswered_rounds_of(ledger: Ledger | LedgerFile) -> UnansweredRounds:
    """The marks that belong to a ledger: one set for all clients that share it.

    Also for the owner of a client that runs elsewhere, such as in a SuperNode, over the ledger's file:

        unanswered_rounds_of(LedgerFile("north.ledger")).go_on(not_the_data="power cut of 3 May")

    Args:
        ledger: the client's.
    """
    if isinstance(ledger, LedgerFile):
        return _InFolder(ledger.path)
    return _of_ledgers_in_memory.setdefault(ledger, _InMemory())
