"""How two parties of a split network talk: a request with tensors, and its reply. Who carries it is a `Channel`.

    reply = channel.request("step", {"step": 7}, {"cut": z}, timeout=30.0)

Names, plain values and tensors only; nothing that is executed on arrival. A request has an address (kind, session,
step), and asking again under the same address is the same request: it gets the reply of the first time, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

__all__ = ["Channel", "Handler", "Packet", "Value"]

Value = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class Packet:
    """One request or reply.

    Attributes:
        kind: what it is about: "hello", "probe", "step", ...; of a reply the request's kind, or "error".
        header: plain values by name.
        tensors: dense tensors on the CPU, by name.
    """

    kind: str
    header: Mapping[str, Value] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


Handler = Callable[[Packet], Packet]


class Channel(Protocol):
    """One party's end of a connection to one other party: asks, and waits for the reply.

    Requests are told apart by (session, kind, step), which the header has. Behind the channel the same address with the
    same bytes is answered as before, and never carried out twice (`ReplayGuard`); the channel itself promises that a
    reply is the one to its request, whole and unchanged, or raises.

    Attributes:
        bytes_sent, bytes_received: counted as framed, without what the transport adds; 0 where nothing is framed.

    Guarantee:
        None of privacy: what is given to it leaves as it is. Protection is the outlet's (`ReleaseDoor`), before.
    """

    @property
    def bytes_sent(self) -> int:
        """Bytes of all requests so far, as framed."""

    @property
    def bytes_received(self) -> int:
        """Bytes of all replies so far, as framed."""

    def request(
        self, kind: str, header: Mapping[str, Value], tensors: Mapping[str, Tensor], *, timeout: float
    ) -> Packet:
        """Ask and wait.

        Args:
            kind: what it is about.
            header: plain values, by name.
            tensors: dense, by name.
            timeout: seconds to wait.

        Raises:
            ChannelError: no reply in time, the connection is gone, or what came is not a reply to this.
        """

    def close(self) -> None:
        """End it; more than once is harmless."""
