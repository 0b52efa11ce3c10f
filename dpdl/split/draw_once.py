"""Values drawn at random once for each row, and kept: a draw that is repeated is a second release.

    store = DrawOnce("rows.cache", kind="rows", settings={"max_norm": 1.0})
    values = store.get(ids, contents, draw=draw)         # draw is asked for what is not there, and never for the rest

One SQLite file, synced before anything is returned. What happens if

- the process is killed: what was drawn and not yet synced has not left, and will be drawn anew; the rest is there.
- several processes ask for the same row: one draws, the others wait and get what it drew.
- the disk is full, or the file is damaged, cut or exchanged: refused, and nothing leaves.
- a value is edited by someone without the file's key, which is in the file: refused. The key tells accidents, not
  attackers.
- an older copy is put back, or the file is copied and both go on: not noticed; rows that the other one had are then
  drawn twice. One store has one place, where only its owner writes. (Deleting it is noticed by the ledger: the next
  store is another release.)

Locks are those of SQLite: of one machine, or of a file system whose locks work.

Private: the file. It says which rows there are, and contents can be guessed against its digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from dpdl.errors import CheckpointError, WrapError
from dpdl.process_lock import ProcessLock
from dpdl.split.row_id import RowId, row_ids

__all__ = ["DrawOnce", "Setting"]

Setting = str | int | float
# Draws values of the rows at these places; the number is the store's own, and no other draw ever has it.
Draw = Callable[[list[int], int], Sequence[bytes]]

_SCHEMA = "dpdl.draw_once/1"
_DIGEST_BYTES = 16  # two of 10^9 rows agree by chance with probability 1e-21
_AT_ONCE = 500  # rows asked for in one query: SQLite takes 999 arguments at least
_LEFT_TO_THE_PARENT: list[sqlite3.Connection] = []
_TABLES = (
    "CREATE TABLE header (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE rows (id BLOB PRIMARY KEY, content BLOB NOT NULL, value BLOB NOT NULL, seal BLOB NOT NULL)",
    "CREATE TRIGGER once BEFORE UPDATE ON rows BEGIN SELECT RAISE(ABORT, 'a row is drawn once'); END",
    "CREATE TRIGGER always BEFORE DELETE ON rows BEGIN SELECT RAISE(ABORT, 'a drawn row stays'); END",
)


class DrawOnce:
    """A table of rows and what was drawn for them.

    Args:
        path: the file, made if there is none; None to keep it in memory, for as long as the process lives.
        kind: what is drawn.
        settings: what the draws depend on; a file that was made with others is refused.
        patience: seconds to wait for another process's draw.

    Raises:
        CheckpointError: the file is damaged, of another kind, or was made with other settings.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        kind: str,
        settings: Mapping[str, Setting],
        patience: float = 60.0,
    ) -> None:
        self.path = None if path is None else Path(path).absolute()
        self._kind = kind
        self._settings = dict(settings)
        self._patience = patience
        self._lock = ProcessLock()
        self._process = os.getpid()
        self._connection = self._connected()
        with self._lock, self._reported():
            self.id, self._key = self._opened()

    @property
    def name(self) -> str:
        """What to call it in an error."""
        return f"{self._kind} in memory" if self.path is None else f"the file {self.path} of {self._kind}"

    @property
    def count(self) -> int:
        """How many rows have been drawn."""
        with self._lock, self._reported():
            return self._counted()

    def __contains__(self, row: object) -> bool:
        """Whether a row has been drawn."""
        rows = row_ids([row])
        with self._lock, self._reported():
            return bool(self._known(rows))

    def get(self, ids: Sequence[object] | Tensor, contents: Sequence[bytes] | None, *, draw: Draw) -> list[bytes]:
        """The value of each row, drawn now where there is none.

        Args:
            ids: the rows; one may be there twice, and has one value.
            contents: what each row holds; None if a value stays whatever becomes of its row.
            draw: given the places of the rows to draw for, in `ids`, and a number that no other draw has; its values
                are on the disk before any of them is returned.

        Returns:
            A value a row.

        Raises:
            CheckpointError: a row's content has changed since it was drawn; or see the class.
        """
        rows = row_ids(ids)
        digests = [b""] * len(rows) if contents is None else [self._digest(content) for content in contents]
        if len(digests) != len(rows):
            raise CheckpointError(f"{len(rows)} rows were named, and {len(digests)} contents given.")
        held = dict(zip(reversed(rows), reversed(digests), strict=True))
        for row, digest in zip(rows, digests, strict=True):
            if held[row] != digest:
                raise self._changed(row)
        with self._lock, self._reported():
            known = self._checked(rows, digests)
            if any(row not in known for row in rows):
                with self._alone():
                    known = self._checked(rows, digests)  # others may have drawn some meanwhile
                    places = sorted({row: place for place, row in enumerate(rows) if row not in known}.values())
                    if places:
                        values = draw(places, self._counted())
                        for place, value in zip(places, values, strict=True):
                            self._insert(rows[place], digests[place], value)
                            known[rows[place]] = value
            return [known[row] for row in rows]

    def close(self) -> None:
        """Let go of the file; more than once is harmless."""
        with self._lock:
            self._connection.close()

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────

    def _connected(self) -> sqlite3.Connection:
        where = ":memory:" if self.path is None else str(self.path)
        try:
            if self.path is not None:  # for nobody else to read; SQLite's own files beside it do as this one
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            connection = sqlite3.connect(where, timeout=self._patience, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA synchronous = EXTRA")  # the folder too, before a commit returns
        except (OSError, sqlite3.Error) as error:
            raise CheckpointError(f"{self.name} cannot be opened: {error}. It needs a folder to write in.") from error
        return connection

    def _opened(self) -> tuple[str, bytes]:
        """The store's name and key, made if it is new."""
        with self._alone():
            tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if not tables:
                for statement in _TABLES:
                    self._connection.execute(statement)
                header = {
                    "schema": _SCHEMA,
                    "kind": self._kind,
                    "id": secrets.token_hex(16),
                    "key": secrets.token_hex(32),
                    "settings": json.dumps(self._settings, sort_keys=True),
                }
                self._connection.executemany("INSERT INTO header VALUES (?, ?)", header.items())
        found = dict(self._connection.execute("SELECT name, value FROM header").fetchall())
        if set(found) != {"schema", "kind", "id", "key", "settings"} or found["schema"] != _SCHEMA:
            raise CheckpointError(f"{self.name} is not a store of {_SCHEMA}. Give another path.")
        if found["kind"] != self._kind:
            raise CheckpointError(f"{self.name} holds {found['kind']} instead. Give another path.")
        if (made := json.loads(found["settings"])) != self._settings:
            differing = [
                f"{name} was {made.get(name)!r}, now {self._settings.get(name)!r}"
                for name in sorted({*made, *self._settings})
                if made.get(name) != self._settings.get(name)
            ]
            raise CheckpointError(
                f"{self.name} was drawn otherwise: {'; '.join(differing)}. Go on as it was, or begin another file: "
                "its rows are then released a second time, and counted so."
            )
        return found["id"], bytes.fromhex(found["key"])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A transaction that nobody else can write beside; all of it, or nothing."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """SQLite's errors in the library's words; a process that was forked has a connection of its own."""
        if os.getpid() != self._process:
            if self.path is None:
                raise WrapError(
                    "Rows that were drawn in memory are known to one process, and this one was forked from it: it "
                    "would draw them again. Give the store a path, or draw before forking."
                )
            # Closing the parent's, which may be in the middle of a transaction, would undo that in the file.
            _LEFT_TO_THE_PARENT.append(self._connection)
            self._connection, self._process = self._connected(), os.getpid()
        try:
            yield
        except sqlite3.Error as error:
            raise CheckpointError(
                f"{self.name} cannot be used: {error}. Nothing was released. If the disk is full, or another process "
                "holds the file, try again; a damaged file is not repaired, and what it had released stays released."
            ) from error

    def _checked(self, rows: Sequence[RowId], digests: Sequence[bytes]) -> dict[RowId, bytes]:
        """Values of those rows that are there, if their contents are what they were."""
        known = self._known(rows)
        for row, digest in zip(rows, digests, strict=True):
            if row in known and known[row][0] != digest:
                raise self._changed(row)
        return {row: value for row, (_, value) in known.items()}

    def _known(self, rows: Sequence[RowId]) -> dict[RowId, tuple[bytes, bytes]]:
        keys = {_key_of(row): row for row in rows}
        wanted = list(keys)
        found: dict[RowId, tuple[bytes, bytes]] = {}
        for begin in range(0, len(wanted), _AT_ONCE):
            some = wanted[begin : begin + _AT_ONCE]
            marks = ",".join("?" * len(some))
            for key, content, value, seal in self._connection.execute(
                f"SELECT id, content, value, seal FROM rows WHERE id IN ({marks})", some
            ):
                if self._seal(key, content, value) != seal:
                    raise CheckpointError(
                        f"{self.name} is damaged: what it holds of the row {keys[key]!r} is not what was written. Put "
                        "back a copy that has everything released so far; without one, begin another file."
                    )
                found[keys[key]] = (content, value)
        return found

    def _insert(self, row: RowId, digest: bytes, value: bytes) -> None:
        key = _key_of(row)
        self._connection.execute(
            "INSERT INTO rows VALUES (?, ?, ?, ?)", (key, digest, value, self._seal(key, digest, value))
        )

    def _counted(self) -> int:
        count: int = self._connection.execute("SELECT count(*) FROM rows").fetchone()[0]
        return count

    def _changed(self, row: RowId) -> CheckpointError:
        return CheckpointError(
            f"The row {row!r} is not what it was when {self.name} drew it. A row keeps its name and its content: no "
            "augmentation, no edits. A changed row released under the old name would be a second release of it."
        )

    def _digest(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, key=self._key, digest_size=_DIGEST_BYTES, person=b"content").digest()

    def _seal(self, key: bytes, content: bytes, value: bytes) -> bytes:
        text = len(key).to_bytes(8, "big") + key + content + value
        return hashlib.blake2b(text, key=self._key, digest_size=_DIGEST_BYTES, person=b"seal").digest()


def _key_of(row: RowId) -> bytes:
    """A row's name in the file: 7 and "7" are two rows."""
    return f"{type(row).__name__}:{row}".encode()
