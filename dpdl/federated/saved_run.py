"""A federated run of `dpdl federated` in a file, from which it goes on after Ctrl-C, or after it was killed.

The file has the server's state, the settings, and what happened. It has no key, and nothing of what clients have
spent: that is in their ledgers, which stay where they are. It is written after each round, so that a process that is
killed loses the round under way; what clients and server have spent in that round stays spent.

What happened is told when the run stops by itself. Of rounds that a killed process played the server knows that they
were, and nothing else: the history then has a gap, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from dpdl.checkpoint_format import read_tree
from dpdl.errors import CheckpointError
from dpdl.federated.durable_file import write_durably
from dpdl.federated.history import History
from dpdl.federated.image_federation import FederationSettings

__all__ = ["SavedRun"]

_SCHEMA = "dpdl.federated.run/1"


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """Where a run is.

    Attributes:
        settings: with which it goes on.
        data: the data's name, by which other data is noticed.
        data_path: where it was read from; None for the embedded digits.
        server: `FederatedServer.state_dict()`.
        history: of the rounds that are told of.
        notes: of the reports so far.
        finished: whether there is nothing to go on with.
    """

    settings: FederationSettings
    data: str
    data_path: str | None
    server: Mapping[str, Any] = field(repr=False)
    history: History
    notes: tuple[str, ...] = ()
    finished: bool = False

    def write(self, file: Path) -> None:
        """Write it, in place of what was there.

        Raises:
            CheckpointError: it cannot be written; what was there is as it was.
        """
        tree = {
            "schema": _SCHEMA,
            "settings": json.dumps(asdict(self.settings)),
            "data": self.data,
            "data_path": self.data_path,
            "server": dict(self.server),
            "history": self.history.to_json(),
            "notes": list(self.notes),
            "finished": self.finished,
        }
        try:
            write_durably(tree, file)
        except (OSError, RuntimeError) as error:  # torch has its own, for a full disk
            raise CheckpointError(
                f"The run could not be saved in {file}: {error}. What was there before is as it was. Make room, or "
                "make the folder writable."
            ) from error

    @classmethod
    def read(cls, file: Path) -> Self:
        """What `write` wrote.

        Raises:
            CheckpointError: it is missing, damaged, something else, or of another version.
        """
        if not file.exists():
            raise CheckpointError(f"There is no run to resume in {file.parent}: {file} is missing.")
        tree = read_tree(file, named=file)
        try:
            if tree["schema"] != _SCHEMA:
                raise CheckpointError(f"{file} is not a federated run: schema {tree['schema']!r}, not {_SCHEMA!r}.")
            settings = json.loads(tree["settings"])
            if set(settings) != {f.name for f in fields(FederationSettings)}:
                raise CheckpointError("The saved settings are of another version; they cannot be resumed.")
            return cls(
                settings=FederationSettings(**settings),
                data=tree["data"],
                data_path=tree["data_path"],
                server=tree["server"],
                history=History.from_json(tree["history"]),
                notes=tuple(tree["notes"]),
                finished=tree["finished"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} is not a federated run: {error!r}. Restore it, or begin anew.") from error
