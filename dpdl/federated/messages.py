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

    Attributes:
        round: the number of the round, from 1.
        state: the global model's state, parameters and buffers by name.
        steps: local steps; None leaves that to the client.
        federation: whose round it is: a name that tells this federation from others on the same data.
        config: further settings, by name.
    """

    round: int
    state: Mapping[str, Tensor]
    steps: int | None = None
    federation: str = "federation"
    config: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FitReply:
    """What a client has learnt.

    Attributes:
        client: its name.
        round: the request's.
        update: by parameter name, weights after training less the request's, on the CPU.
        base: the request's state, so that `state` can be told; it is not sent.
        releases: everything that leaves with this reply, and what covers it.
        weight: in the mean over clients; at most the server's largest. A count of examples is a release.
        metrics: numbers that leave besides; empty unless asked for.
    """

    client: str
    round: int
    update: Mapping[str, Tensor]
    base: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    releases: Inventory = field(default_factory=Inventory)
    weight: float = 1.0
    metrics: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Tensor]:
        """The client's weights: the request's state and the update."""
        moved = {name: self.base[name] + change.to(self.base[name]) for name, change in self.update.items()}
        return {**self.base, **moved}


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
    """Whoever can answer a request: `DPClient`, `PlainClient`, a wrapper around them."""

    @property
    def name(self) -> str:
        """What the server calls it."""

    def answer(self, request: FitRequest) -> FitReply | Refusal:
        """Train and reply, or say why not. Raises nothing that a server should count instead."""
