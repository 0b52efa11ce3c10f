"""Answers that were given, kept so that a request that comes twice gets the same bytes twice.

A reply may be lost on its way, or a server may be restarted: it asks again. Training again would be another release,
with new noise, of the same round; its difference to the first tells more than either, and it would have to be paid
for. So a client looks here first, by a digest of the request (round, federation, steps, every byte of the weights) and
of its own settings. A request with other weights under the same number is another one: it is trained, and spends.

A reply is stored before it is handed out. In a folder it outlives the process: a file a reply, whole or not at all, on
the disk before the reply leaves. What is too old to be asked for is thrown away, except that it was answered: asked for
all the same, it is refused, and never trained again.

A folder holds what was sent anyway. Whoever can write to it can change what is sent, and spends nothing by it.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from accountants import arguments
from dpdl.checkpoint_format import read_tree
from dpdl.errors import CheckpointError, ParameterError
from dpdl.federated.durable_file import write_durably
from dpdl.federated.inventory import Inventory
from dpdl.federated.messages import FitReply, FitRequest

__all__ = ["ReplyStore"]

_SCHEMA = "dpdl.federated.reply/1"
_SUFFIX = ".reply"
_DROPPED = ".answered"  # beside the name of a reply that is kept no longer


class ReplyStore:
    """The last replies to each federation.

    Args:
        path: a folder, made if there is none; None keeps replies in memory, as long as the process lives.
        keep: how many replies to one federation are kept whole.

    Raises:
        CheckpointError: the folder cannot be made or read.
        ParameterError: keep is not a positive number.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, keep: int = 1) -> None:
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise ParameterError(f"replies are kept in a folder: give its path, or None, not {path!r}.")
        self.path = None if path is None else Path(path).absolute()
        self.keep = arguments.positive_whole("keep", keep, remedy="Give 1 to keep the last reply.")
        self._in_memory: dict[str, FitReply | None] = {}  # None: answered, thrown away
        self._order: dict[str, OrderedDict[str, None]] = {}  # of each federation, names of what is kept, oldest first
        if self.path is not None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                files = sorted(self.path.glob(f"*{_SUFFIX}"), key=lambda file: file.stat().st_mtime_ns)
            except OSError as error:
                raise CheckpointError(f"Replies cannot be kept in {self.path}: {error.strerror}.") from error
            for file in files:
                self._order.setdefault(file.name.partition("-")[0], OrderedDict())[file.name] = None

    def find(self, request: FitRequest, digest: str, *, client: str) -> FitReply | None:
        """The reply to that request, with the request's state as its base; None if it was never answered.

        Args:
            request: as it came.
            digest: what tells it from others.
            client: who is asked.

        Raises:
            ParameterError: it was answered so long ago that the reply is gone.
            CheckpointError: the stored reply is damaged.
        """
        name = _name(request, digest, client)
        reply, answered = self._read(name)
        if not answered:
            return None
        if reply is None:
            raise ParameterError(
                f"Round {request.round} of '{request.federation}' was answered before, and the answer is no longer "
                "kept; the round is not trained twice. Go on with a later round, or let the client keep more replies: "
                f"ReplyStore(..., keep={self.keep + 1})."
            )
        return _with(reply, base=request.state, update={n: t.clone() for n, t in reply.update.items()})

    def put(self, reply: FitReply, request: FitRequest, digest: str) -> None:
        """Keep a reply that is about to be handed out.

        Args:
            reply: what the client has made of it.
            request: what it answers.
            digest: of the request, by which `find` knows it again.

        Raises:
            CheckpointError: it could not be written; it must not be handed out.
        """
        name = _name(request, digest, reply.client)
        kept = _with(reply, base={}, update={n: t.detach().clone() for n, t in reply.update.items()})
        self._write(name, kept)
        order = self._order.setdefault(name.partition("-")[0], OrderedDict())
        order[name] = None
        order.move_to_end(name)
        while len(order) > self.keep:
            self._drop(order.popitem(last=False)[0])

    def _read(self, name: str) -> tuple[FitReply | None, bool]:
        """A reply, if it is kept, and whether there ever was one."""
        if self.path is None:
            return self._in_memory.get(name), name in self._in_memory
        file = self.path / name
        if file.exists():
            return _reply(read_tree(file, named=file), file), True
        return None, file.with_suffix(_DROPPED).exists()

    def _drop(self, name: str) -> None:
        if self.path is None:
            self._in_memory[name] = None
            return
        file = self.path / name
        try:
            file.with_suffix(_DROPPED).touch()
            file.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"An old reply in {self.path} could not be dropped: {error.strerror}.") from error

    def _write(self, name: str, reply: FitReply) -> None:
        if self.path is None:
            self._in_memory[name] = reply
            return
        file = self.path / name
        try:
            write_durably(_tree(reply), file)
        except (OSError, RuntimeError) as error:  # torch has its own, for a full disk
            raise CheckpointError(f"The reply could not be kept in {self.path}: {error}. It is not sent.") from error


def _name(request: FitRequest, digest: str, client: str) -> str:
    whose = hashlib.blake2b(repr((client, request.federation)).encode(), digest_size=8).hexdigest()
    return f"{whose}-{digest}{_SUFFIX}"


def _with(reply: FitReply, *, base: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> FitReply:
    return FitReply(
        client=reply.client,
        round=reply.round,
        update=update,
        base=base,
        tied=dict(reply.tied),
        releases=reply.releases,
        weight=reply.weight,
        metrics=dict(reply.metrics),
    )


def _tree(reply: FitReply) -> dict[str, Any]:
    return {
        "schema": _SCHEMA,
        "reply": {
            "client": reply.client,
            "round": reply.round,
            "update": dict(reply.update),
            "tied": dict(reply.tied),
            "releases": reply.releases.to_list(),
            "weight": reply.weight,
            "metrics": dict(reply.metrics),
        },
    }


def _reply(tree: Any, file: Path) -> FitReply:
    try:
        if tree["schema"] != _SCHEMA:
            raise CheckpointError(f"{file} is not a kept reply: schema {tree['schema']!r}, expected {_SCHEMA!r}.")
        kept = tree["reply"]
        return FitReply(**{**kept, "releases": Inventory.from_list(kept["releases"])})
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is not a kept reply: {error!r}. Restore it, or go on with a later round."
        ) from error
