"""Which node of Flower's grid is which client: Flower numbers nodes at random, a federation knows names.

Each node is asked once. A node that starts again has another number and the same name; the later one then stands for
it. Who has gone is still one of the federation: the population that a sample rate refers to does not shrink because a
machine is off.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from dpdl.errors import ChannelError, DataError

__all__ = ["NAME_QUERY", "Nodes", "name_reply"]

NAME_QUERY = "query.dpdl_name"
_WHO = "dpdl.who"
_WAIT = 1.0  # seconds between two looks at which nodes there are


def name_reply(name: str) -> RecordDict:
    """What a node answers to `NAME_QUERY`: its client's name."""
    return RecordDict({_WHO: ConfigRecord({"client": name})})


class Nodes:
    """Names of clients, and the nodes that stand for them.

    Args:
        names: by node, of nodes that need not be asked.
    """

    def __init__(self, names: Mapping[int, str] | None = None) -> None:
        self._name = dict(names or {})
        self._node = {name: node for node, name in self._name.items()}
        self._online: set[int] = set()
        self._trouble = ""  # what a node said instead of its name

    @property
    def names(self) -> tuple[str, ...]:
        """Of all clients that were ever there, sorted."""
        return tuple(sorted(self._node))

    def node_of(self, name: str) -> int | None:
        """The node that stands for a client; None if it is not there now."""
        node = self._node.get(name)
        return node if node in self._online else None

    def meet(self, grid: Grid, *, at_least: int, timeout: float) -> None:
        """Ask those nodes who they are that have not been asked; wait until there are enough.

        Args:
            grid: Flower's.
            at_least: how many clients must be known.
            timeout: for how many seconds to wait for them, and for answers.

        Raises:
            ChannelError: there were fewer in that time.
            DataError: a node runs another app.
        """
        end = time.monotonic() + timeout
        while True:
            self._online = set(grid.get_node_ids())
            self._ask(grid, sorted(self._online - set(self._name)), timeout=max(_WAIT, end - time.monotonic()))
            if len(self._node) >= at_least:
                return
            if time.monotonic() >= end:
                raise ChannelError(
                    f"{len(self._node)} clients have said who they are in {timeout:g} seconds, where {at_least} were "
                    "waited for. Start the other SuperNodes, or give DPStrategy fewer `clients` or more `patience`."
                    f"{self._trouble}"
                )
            time.sleep(_WAIT)

    def _ask(self, grid: Grid, nodes: list[int], *, timeout: float) -> None:
        if not nodes:
            return
        questions = [
            Message(content=RecordDict(), dst_node_id=node, message_type=NAME_QUERY, ttl=timeout) for node in nodes
        ]
        for answer in grid.send_and_receive(questions, timeout=timeout):
            if answer.has_content():
                self._learn(answer.metadata.src_node_id, answer.content)
            else:
                self._trouble = f" Node {answer.metadata.src_node_id}: {answer.error.reason}"

    def _learn(self, node: int, content: RecordDict) -> None:
        who = content.config_records.get(_WHO)
        name = None if who is None else who.get("client")
        if not isinstance(name, str):
            raise DataError(f"Node {node} does not say who it is. Its ClientApp must be one that client_app made.")
        self._name[node] = name
        self._node[name] = node
