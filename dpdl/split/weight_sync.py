"""Several clients train one network in turn: how the client's parts get from one to the next.

    turns = TurnTaking({"north": north, "south": south}, sync="peer_to_peer")
    turns.run(rounds=10, steps=20)

- "peer_to_peer": the next client gets them from the last one.
- "server": the last client leaves them with a party that they both ask, and the next one takes them from there.
- "none": every client keeps parts of its own.

Only weights travel, and they are what noisy steps have made of them: to whoever gets them, the last client's records
are as protected as to those who get the trained network, and no more is spent. Optimizers (momentum, say) stay. A
weight server, though, then has what computes the activations that it is sent, if those are sent to it as well.

Over a network, clients do the same by packets: `WeightShelf` answers, `leave_weights` and `fetch_weights` ask.

References:
    Gupta and Raskar, Distributed learning of deep neural network over multiple agents, 2018. arXiv:1810.06060,
    sections 3.2 (peer-to-peer and centralised weight sharing) and 3.3.
    Vepakomma et al., Split learning for health, 2018. arXiv:1812.00564.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Literal, final, get_args

from torch import Tensor

from dpdl.errors import ChannelError, ParameterError
from dpdl.split.channel import Channel, Packet
from dpdl.split.client import SplitClient
from dpdl.split.walk import refuse_wrong_reply

__all__ = ["Sync", "TurnTaking", "WeightShelf", "fetch_weights", "leave_weights"]

Sync = Literal["peer_to_peer", "server", "none"]
_PUT, _GET = "put weights", "get weights"


@final
class WeightShelf:
    """A handler that keeps the weights that were left with it last, for whoever comes next. For any number of threads.

    Args:
        weights: to begin with, by name; None if somebody has to leave some first.

    Guarantee:
        None by itself. Weights of clients that train under a plan with noise are differentially private, and so is what
        is kept here; without noise whoever holds the shelf can try to invert them.
    """

    def __init__(self, weights: Mapping[str, Tensor] | None = None) -> None:
        self._lock = threading.Lock()
        self._weights = None if weights is None else dict(weights)

    def handle(self, packet: Packet) -> Packet:
        """Answer one request, a packet.

        Raises:
            ChannelError: it is of another kind, or there are no weights yet.
        """
        with self._lock:
            if packet.kind == _PUT:
                self._weights = {name: tensor.detach().clone() for name, tensor in packet.tensors.items()}
                return Packet(kind=_PUT)
            if packet.kind != _GET:
                raise ChannelError(f"A weight shelf does not know requests of kind {packet.kind!r}.")
            if self._weights is None:
                raise ChannelError("Nobody has left weights yet. The first client begins with its own.")
            return Packet(kind=_GET, tensors=dict(self._weights))


def leave_weights(client: SplitClient, channel: Channel, *, number: int, timeout: float = 60.0) -> None:
    """Leave the weights of a client's parts with whoever answers the channel.

    Args:
        client: whose; its last step is finished first.
        channel: to a `WeightShelf`.
        number: of this request, counted upwards.
        timeout: seconds to wait.
    """
    client.finish()
    weights = {name: tensor.cpu() for name, tensor in client.party.weights().items()}
    reply = channel.request(_PUT, {"session": client.session, "step": number}, weights, timeout=timeout)
    refuse_wrong_reply(reply, _PUT, "the weight shelf")


def fetch_weights(client: SplitClient, channel: Channel, *, number: int, timeout: float = 60.0) -> None:
    """Take over the weights that were left last; arguments as in `leave_weights`.

    Raises:
        ModelError: they do not fit; nothing was changed.
    """
    client.finish()
    reply = channel.request(_GET, {"session": client.session, "step": number}, {}, timeout=timeout)
    refuse_wrong_reply(reply, _GET, "the weight shelf")
    client.party.load_weights(reply.tensors)


@final
class TurnTaking:
    """Clients of equal parts, one after another, each under its own plan and ledger.

    Args:
        clients: in their order.
        sync: how the client's parts go on.
        shelf: with "server", the channel to the weight server of each client, by name.

    Guarantee:
        Each client's own claims: the weights that travel are what its noisy steps have made, and cost nothing more.

    Raises:
        ParameterError: fewer than two clients, another sync, or a shelf where none is used.
        ModelError: the clients' parts are not equal.
    """

    def __init__(
        self, clients: Mapping[str, SplitClient], *, sync: Sync, shelf: Mapping[str, Channel] | None = None
    ) -> None:
        if sync not in get_args(Sync):
            raise ParameterError(f"sync must be one of {list(get_args(Sync))}, got {sync!r}.")
        if len(clients) < 2:
            raise ParameterError(f"Taking turns needs at least two clients, got {list(clients)}.")
        if (sync == "server") != (shelf is not None) or (shelf is not None and set(shelf) != set(clients)):
            raise ParameterError(
                f"shelf is a channel for each of {list(clients)} with sync='server', and None otherwise; got "
                f"{None if shelf is None else list(shelf)} with sync={sync!r}."
            )
        self._clients, self._sync, self._shelf = dict(clients), sync, dict(shelf or {})
        self._turns = 0
        self._last: SplitClient | None = None
        if sync != "none":
            _refuse_unequal(list(clients.values()))

    def run(self, *, rounds: int, steps: int) -> None:
        """Let every client take `steps` steps, `rounds` times.

        Raises:
            PrivacyError: as `SplitClient.run`; turns that were taken stay taken.
        """
        for _ in range(rounds):
            for name, client in self._clients.items():
                self._take_over(name, client)
                client.run(steps)
                self._hand_on(name, client)

    def _take_over(self, name: str, client: SplitClient) -> None:
        if self._last is None or self._sync == "none":
            return
        if self._sync == "peer_to_peer":
            client.party.load_weights(self._last.party.weights())
        else:
            fetch_weights(client, self._shelf[name], number=self._turns)

    def _hand_on(self, name: str, client: SplitClient) -> None:
        if self._sync == "server":
            leave_weights(client, self._shelf[name], number=self._turns)
        self._turns += 1
        self._last = client


def _refuse_unequal(clients: list[SplitClient]) -> None:
    """Raise unless all clients' parts have the same tensors."""
    first = {name: (t.shape, t.dtype) for name, t in clients[0].party.weights().items()}
    for client in clients[1:]:
        if {name: (t.shape, t.dtype) for name, t in client.party.weights().items()} != first:
            raise ParameterError(
                f"The parts of client '{client.name}' are not those of '{clients[0].name}', so weights cannot go from "
                "one to the other. Use equal parts, or sync='none'."
            )
