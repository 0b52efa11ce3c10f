"""Which requests were begun and what was answered, in a SQLite database [1]: in memory, or in a file that outlives us.

A row is written before the handler is called, and again with the reply before the reply is sent. Both are on the disk
when `begin` and `finish` return, so whoever opens the file after a crash knows of each request whether it was begun,
and has its reply if one can have left. One server at a time: the file is locked while it is open.

Public: sessions and steps. Replies are what the other party was sent; the file is readable for its owner alone.

References:
    [1] SQLite, "Atomic Commit In SQLite". sqlite.org/atomiccommit.html
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpdl.errors import ChannelError

__all__ = ["Address", "Kept", "ReplyStore"]

_APPLICATION = 0x6470646C  # "dpdl": tells our files from other SQLite databases
_SCHEMA = 1
_TABLE = """
CREATE TABLE replies (
    session TEXT NOT NULL, kind TEXT NOT NULL, step INTEGER NOT NULL,
    peer TEXT NOT NULL, request BLOB NOT NULL, reply BLOB,
    PRIMARY KEY (session, kind, step)
)
"""


@dataclass(frozen=True, kw_only=True)
class Address:
    """What a request is about.

    Attributes:
        session: whose run.
        kind: what is asked for.
        step: the how-manieth time.
    """

    session: str
    kind: str
    step: int

    def __str__(self) -> str:
        return f"'{self.kind}', step {self.step} of the session {self.session!r}"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is known of a request.

    Attributes:
        request: its digest.
        reply: the frame that was answered; None if the handler has not come to an end.
    """

    request: bytes
    reply: bytes | None


class ReplyStore:
    """The rows. Not for several threads at once.

    Args:
        path: of the file; None keeps the rows in memory.

    Raises:
        ChannelError: the file is of something else, damaged, or open elsewhere.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.name = "the memory of replies" if path is None else f"the replies in {Path(path)}"
        with self._says("cannot be opened"):
            if path is not None:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._rows = sqlite3.connect(
                ":memory:" if path is None else Path(path).absolute(),
                timeout=0.0,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                self._open()
            except BaseException:
                self._rows.close()
                raise

    def _open(self) -> None:
        run = self._rows.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")  # a commit waits for the disk: power may fail, too
        with self._transaction():
            if run("PRAGMA schema_version").fetchone()[0] == 0:
                run(f"PRAGMA application_id = {_APPLICATION}")
                run(f"PRAGMA user_version = {_SCHEMA}")
                run(_TABLE)
        found = run("PRAGMA application_id").fetchone()[0], run("PRAGMA user_version").fetchone()[0]
        if found != (_APPLICATION, _SCHEMA):
            raise ChannelError(f"{self.name}: this file is something else, or of another version. Give another path.")

    def kept(self, address: Address) -> Kept | None:
        """What is known of a request; None if it is not there (any more)."""
        row = self._one(
            "SELECT request, reply FROM replies WHERE session = ? AND kind = ? AND step = ?",
            (address.session, address.kind, address.step),
        )
        return None if row is None else Kept(request=row[0], reply=row[1])

    def last_step(self, address: Address) -> int | None:
        """The last step that was begun of the same session and kind."""
        query = "SELECT MAX(step) FROM replies WHERE session = ? AND kind = ?"
        row = self._one(query, (address.session, address.kind))
        return None if row is None else row[0]

    def peer(self, session: str) -> str | None:
        """Whose session it is; None if it is new."""
        row = self._one("SELECT peer FROM replies WHERE session = ? LIMIT 1", (session,))
        return None if row is None else row[0]

    def streams(self, peer: str) -> int:
        """How many pairs of session and kind there are of one peer."""
        row = self._one("SELECT COUNT(*) FROM (SELECT DISTINCT session, kind FROM replies WHERE peer = ?)", (peer,))
        assert row is not None
        count: int = row[0]
        return count

    def begin(self, address: Address, *, request: bytes, peer: str) -> None:
        """The handler is about to be called.

        Raises:
            ChannelError: that could not be written; the handler must not be called.
        """
        values = (address.session, address.kind, address.step, peer, request)
        with self._says("could not be written"), self._transaction():
            self._rows.execute("INSERT INTO replies VALUES (?, ?, ?, ?, ?, NULL)", values)

    def finish(self, address: Address, reply: bytes, *, keep: int) -> None:
        """The handler has come to an end; the reply has not left yet.

        Args:
            address: of the request.
            reply: its frame.
            keep: of how many steps replies are kept; those before are forgotten.

        Raises:
            ChannelError: that could not be written; the reply must not be sent.
        """
        of = (address.session, address.kind)
        with self._says("could not be written"), self._transaction():
            self._rows.execute(
                "UPDATE replies SET reply = ? WHERE session = ? AND kind = ? AND step = ?", (reply, *of, address.step)
            )
            self._rows.execute(
                "DELETE FROM replies WHERE session = ? AND kind = ? AND step NOT IN "
                "(SELECT step FROM replies WHERE session = ? AND kind = ? ORDER BY step DESC LIMIT ?)",
                (*of, *of, keep),
            )

    def close(self) -> None:
        """Let go of the file; more than once is harmless."""
        self._rows.close()

    def _one(self, query: str, values: tuple[object, ...]) -> tuple[Any, ...] | None:
        with self._says("cannot be read"):
            row: tuple[Any, ...] | None = self._rows.execute(query, values).fetchone()
            return row

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._rows.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._rows.execute("ROLLBACK")
            raise
        self._rows.execute("COMMIT")

    @contextmanager
    def _says(self, what: str) -> Iterator[None]:
        """SQLite's errors, with the file they are about."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise ChannelError(
                f"{self.name} {what}: {error}. The file belongs to one server at a time, on a disk with room; if it "
                "is damaged, restore it, or begin new sessions with a new one."
            ) from error
