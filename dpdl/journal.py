"""A file of sealed lines that several processes append to, and that survives any of them.

Every look at the file opens it, locks it, checks that what was known of it is still its beginning, and reads what has
come since. An append is one write and one wait for the disk. Only the lines' seals are known here; what they
mean is told to whoever made the journal.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from dpdl.errors import LedgerError
from dpdl.ledger_lines import BEFORE_THE_FIRST, Content, Header, pieces, sealed, unsealed

__all__ = ["Journal"]

_log = logging.getLogger(__name__)
_sync_data = getattr(os, "fdatasync", os.fsync)  # length and contents; times of access can wait


class Journal:
    """Appends and reads sealed lines.

    Args:
        path: of the file.
        take: told of each line's content and number, once, in order; it may raise, and the line is then not taken.
        forget: told that all lines will be told again, from the first: an interrupt fell into the telling.
    """

    def __init__(self, path: Path, take: Callable[[Content, int], None], *, forget: Callable[[], None]) -> None:
        self._path = path
        self._tell = take
        self._forget = forget
        self._start()

    def _start(self) -> None:
        """Nothing is known of the file."""
        self._link = BEFORE_THE_FIRST
        self._end = 0  # bytes that are known
        self._last = b""  # the line that they end with
        self._held: tuple[int, int] | None = None  # by which process, and the open file

    def create(self, header: Header) -> None:
        """Make the file, whole or not at all, if nobody else does."""
        line, _ = sealed(header, BEFORE_THE_FIRST)
        try:
            handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, self._path)
            finally:
                os.unlink(temporary)
            directory = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise LedgerError(
                f"The ledger {self._path} cannot be made: {error.strerror}. It needs a folder that can be written to, "
                "on a file system with hard links and locks."
            ) from error

    @contextlib.contextmanager
    def locked(self, *, exclusive: bool = True) -> Iterator[int]:
        """The file, locked, and read to its end. It is opened anew each time: an open lock would go along with a fork.

        Who asks again while it has the lock (a signal's handler) is answered from what was read; it cannot write.

        Raises:
            LedgerError: it is gone, was changed, or cannot be opened.
        """
        if self._held is not None and self._held[0] == os.getpid():
            if exclusive:
                raise LedgerError(
                    f"The ledger {self._path} is being written to by this very thread. Record from the training loop, "
                    "not from the handler of a signal."
                )
            yield self._held[1]
            return
        with self._says("cannot be opened"):
            file = os.open(self._path, (os.O_RDWR | os.O_APPEND if exclusive else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            with self._says("cannot be locked", remedy=" Keep it on a file system that has flock."):
                fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            self._held = os.getpid(), file
            with self._says("cannot be read, or its torn end not be set aside"):
                self._read_on(file, repair=exclusive)
            yield file
        finally:
            self._held = None
            with contextlib.suppress(OSError):  # a fork meanwhile has it open, too: would keep it locked
                fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)

    def append(self, file: int, content: Content) -> None:
        """Add one line to the file that `locked` yields; it is on the disk when this returns.

        Raises:
            LedgerError: it could not be written. What has come to the disk all the same is found next time, and counts.
        """
        line, _ = sealed(content, self._link)
        if unsealed(line[:-1], self._link)[0] != content:  # a line that nobody could read would stop all runs for good
            raise LedgerError(f"The ledger {self._path} was not written: {content} does not read back as what it is.")
        with self._says("could not be written", remedy=" Nothing was released."):
            if os.write(file, line) != len(line):
                os.ftruncate(file, self._end)
                raise LedgerError(f"The ledger {self._path} was not written: the disk is full. Nothing was released.")
            _sync_data(file)
        self._take(line[:-1])

    @contextlib.contextmanager
    def _says(self, what: str, *, remedy: str = "") -> Iterator[None]:
        """The system's errors, with the ledger they are about."""
        try:
            yield
        except OSError as error:
            beside = "" if error.filename in (None, str(self._path)) else f" ({error.filename})"
            raise LedgerError(f"The ledger {self._path} {what}: {error.strerror}{beside}.{remedy}") from error

    def damaged(self, what: str) -> LedgerError:
        """The error that says so."""
        return LedgerError(
            f"The ledger {self._path} is damaged: {what}. It is left as it is. Restore it from a copy that has all "
            "releases; without one, what this data has spent is unknown."
        )

    def _read_on(self, file: int, *, repair: bool) -> None:
        size = os.fstat(file).st_size
        if _read(file, self._end - len(self._last), self._end) != self._last:
            raise self.damaged("what this process had read from it is no longer there")
        if size == self._end:
            return
        lines, rest = pieces(_read(file, self._end, size))
        if lines:
            _sync_data(file)  # who wrote them may have died before, or failed; what is repeated relies on them
        for line in lines:
            self._take(line)
        if not rest:
            return
        if self._link is BEFORE_THE_FIRST:
            raise self.damaged("its first line is broken off")
        if not repair:
            return  # nobody writes now, so it is torn, and its release has not left
        if self._is_whole(rest):  # all but its line feed: to be on the safe side it counts
            os.write(file, b"\n")
            _sync_data(file)
            self._take(rest)
        else:
            self._set_aside(file, rest)

    def _is_whole(self, line: bytes) -> bool:
        try:
            unsealed(line, self._link)
        except LedgerError:
            return False
        return True

    def _take(self, line: bytes) -> None:
        try:
            content, link = unsealed(line, self._link)
        except LedgerError as error:
            raise self.damaged(str(error)) from error
        try:
            self._tell(content, self._link.number)
            self._link, self._last = link, line + b"\n"
            self._end += len(self._last)
        except (KeyboardInterrupt, SystemExit):
            self._start()
            self._forget()
            raise

    def _set_aside(self, file: int, torn: bytes) -> None:
        beside = self._path.with_name(f"{self._path.name}.torn")
        copy = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            kept = torn.rstrip(b"\n") + b"\n"
            if os.write(copy, kept) != len(kept):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(beside))
            os.fsync(copy)
        finally:
            os.close(copy)
        os.ftruncate(file, self._end)
        os.fsync(file)
        _log.warning(
            "The last line of the ledger %s is torn. If a process died while it wrote, as is likely, its release has "
            "not left; if the file was cut afterwards, restore it from a copy. The %d bytes are in %s.",
            self._path,
            len(torn),
            beside,
        )


def _read(file: int, begin: int, end: int) -> bytes:
    parts: list[bytes] = []
    while begin < end:
        part = os.pread(file, min(end - begin, 1 << 24), begin)
        if not part:
            break
        parts.append(part)
        begin += len(part)
    return b"".join(parts)
