"""What a server and its clients say to each other, whatever carries it: a runner in one process, or Flower.

    FitRequest ─▶ client ─▶ FitReply, or Refusal

Tensors and plain values only. An update is a difference: weights after training less the global weights that came with
the request, of trainable parameters alone; buffers stay at home unless a client is told to send them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from dpdl.federated.inventory import Inventory

__all__ = ["Client", "FitReply", "FitRequest", "Refusal", "Scalar"]

Scalar = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """Train on what you have, from these weights.

    Public: all of it. To a private client it is an adaptive input: a server may ask for what it likes, as often as it
    likes, and the client's guarantee holds all the same.

    Attributes:
        round: the number of the round, from 1.
        state: the global model's state, parameters and buffers by name, in the model's own shapes and dtypes.
        steps: local steps, of one logical batch each; None leaves that to the client.
        federation: whose round it is: a name that tells this federation from others on the same data, in one line of
            printable characters.
        config: further settings, by name. dpdl's own clients do not read them.

    Making one checks nothing: the client that answers does, and refuses ("request").
    """

    round: int
    state: Mapping[str, Tensor]
    steps: int | None = None
    federation: str = "federation"
    config: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FitReply:
    """What a client has learnt.

    Its own part leaves the client: `update`, `weight`, `metrics`, and the list of them. What protects each is in
    `releases`, said by the client that made the reply; making a reply checks nothing.

    Attributes:
        client: its name.
        round: the request's.
        update: by parameter name, weights after training less the request's, in their shapes and dtypes, on the CPU.
        base: the request's state, by name, so that `state` can be told; it is not sent.
        tied: by further names of the model's parameters, the name under which their change is in `update`; it is not
            sent.
        releases: everything that leaves with this reply, and what covers it.
        weight: in the mean over clients; at most the server's largest. A count of examples is a release.
        metrics: numbers that leave besides; empty unless asked for.
    """

    client: str
    round: int
    update: Mapping[str, Tensor]
    base: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    tied: Mapping[str, str] = field(default_factory=dict, repr=False)
    releases: Inventory = field(default_factory=Inventory)
    weight: float = 1.0
    metrics: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Tensor]:
        """The client's weights by name: the request's and the update, a tied parameter the same under each name."""
        moved = {name: self.base[name] + change.to(self.base[name]) for name, change in self.update.items()}
        tied = {name: moved[one] for name, one in self.tied.items() if name in self.base and one in moved}
        return {**self.base, **moved, **tied}


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A client that does not take part in a round, which the server can count.

    Attributes:
        client: its name.
        round: the request's.
        reason: "budget" (a step would overspend), "request" (it cannot be done as asked), "failed" (training broke off;
            what was released stays spent), or "lost" (no answer came).
        message: why, for the client's own log and the server's; it says nothing of the data.
    """

    client: str
    round: int
    reason: str
    message: str = ""


class Client(Protocol):
    """Whoever can answer a request: `DPClient`, `PlainClient`, a wrapper around them.

    One of your own needs no more than these two. What it promises it says in a method `report(delta)`, which returns an
    `AdversaryReport`; of a client without one `federated_report` claims nothing. A wrapper keeps the one that it wraps
    in the attribute `client`, so that its ledger is found.
    """

    @property
    def name(self) -> str:
        """What the server calls it."""

    def answer(self, request: FitRequest) -> FitReply | Refusal:
        """Train as the request says and reply, or say why not. Raises nothing that a server should count instead."""
