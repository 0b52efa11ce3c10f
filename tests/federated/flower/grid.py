"""A grid of Flower's in one process: each message is inflated from its bytes, as after a journey, and answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents


def travelled(message: Message) -> Message:
    """The message after it was serialised and read again."""
    contents = {key: thing.deflate() for key, thing in get_all_nested_objects(message).items()}
    arrived = inflate_object_from_contents(get_object_tree(message).object_id, contents)
    assert isinstance(arrived, Message)
    arrived.metadata.__dict__["_message_id"] = message.metadata.message_id
    return arrived


def context(index: int = 0, number: int = 2, **node_config: Any) -> Context:
    return Context(
        run_id=1,
        node_id=100 + index,
        node_config={"partition-id": index, "num-partitions": number, **node_config},
        state=RecordDict(),
        run_config={},
    )


class OneProcess(Grid):
    """Nodes 100, 101, ... that run an app one after the other.

    Args:
        app: theirs.
        contexts: one a node.
        silent: nodes that take a training request and never answer.
        dead: nodes that Flower's SuperLink gives up.
    """

    def __init__(
        self,
        app: ClientApp | Callable[[Message, Context], Message],
        contexts: Iterable[Context],
        *,
        silent: Iterable[int] = (),
        dead: Iterable[int] = (),
    ) -> None:
        self.app = app
        self.contexts: dict[int, Context] = {each.node_id: each for each in contexts}
        self.silent, self.dead = set(silent), set(dead)
        self.sent: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        answers = []
        for message in messages:
            self.sent.append(message)
            message.metadata.__dict__["_message_id"] = f"message {len(self.sent)}"  # as Flower's own grids do
            node = message.metadata.dst_node_id
            if message.metadata.message_type == "train" and node in self.silent:
                continue
            if message.metadata.message_type == "train" and node in self.dead:
                answers.append(create_message_error_unavailable_res_message(message.metadata, "node_unavail"))
                continue
            answers.append(travelled(self.app(travelled(message), self.contexts[node])))
        return reversed(answers)  # whoever was asked last answers first

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


def arrays_of(content: RecordDict) -> Mapping[str, Any]:
    """The numpy arrays of a message with one ArrayRecord."""
    (record,) = content.array_records.values()
    return {name: array.numpy() for name, array in record.items()}
