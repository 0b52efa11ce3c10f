"""What all channels have in common: packets become frames, replies are checked, bytes are counted.

A channel of this kind says only how a frame gets across (`_carry`). That the reply is whole, that it answers this very
request, and what an error in it means, is decided here, once.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

from torch import Tensor

from dpdl import errors
from dpdl.errors import ChannelError, ParameterError, PrivacyError
from dpdl.split import frames
from dpdl.split.channel import Packet, Value
from dpdl.split.frames import FrameLimits

__all__ = ["FramedChannel", "address_of", "refuse_timeout", "understood"]


class FramedChannel(ABC):
    """One party's end of a connection over which frames go.

    Args:
        limits: that requests and replies must be within.
    """

    def __init__(self, *, limits: FrameLimits) -> None:
        self.limits = limits
        self._sent = 0
        self._received = 0
        self._counting = threading.Lock()

    @property
    @final
    def bytes_sent(self) -> int:
        """Bytes of all requests so far, as framed; those that were sent again count again."""
        return self._sent

    @property
    @final
    def bytes_received(self) -> int:
        """Bytes of all replies so far, as framed."""
        return self._received

    @final
    def request(
        self, kind: str, header: Mapping[str, Value], tensors: Mapping[str, Tensor], *, timeout: float
    ) -> Packet:
        """Ask once and wait.

        Args:
            kind: what it is about.
            header: plain values; with "session" and "step", where the other party guards against repetitions.
            tensors: by name; dense, on the CPU.
            timeout: seconds.

        Raises:
            ChannelError: no reply in time, the connection is gone, or what came is not a reply to this. Whether the
                other party has acted on it is then unknown.
            PrivacyError: of whatever class, as the other party has raised it.
            ParameterError: timeout is not a finite number of seconds > 0.
        """
        frame = frames.encode(Packet(kind=kind, header=header, tensors=tensors), self.limits)
        return understood(self.exchange(frame, timeout=timeout))

    @final
    def exchange(self, frame: bytes, *, timeout: float) -> Packet:
        """Send a frame, and the reply to it as it is: a packet of the same kind, or "error".

        Args:
            frame: as `frames.encode` makes it.
            timeout: seconds.

        Raises:
            ChannelError: as `request`.
            ParameterError: as `request`.
        """
        refuse_timeout(timeout)
        with self._counting:
            self._sent += len(frame)
        reply = self._carry(frame, timeout)
        with self._counting:
            self._received += len(reply)
        packet = frames.decode(reply, self.limits)
        if frames.answers(reply) != frames.digest(frame):
            found = f": {packet.header.get('message')}" if packet.kind == "error" else ""
            raise ChannelError(f"What came back is a reply to another request, or the request came damaged{found}")
        return packet

    @abstractmethod
    def _carry(self, frame: bytes, timeout: float) -> bytes:
        """Bring a frame across, and what is answered back, within so many seconds.

        Raises:
            ChannelError: that could not be done.
        """

    @abstractmethod
    def close(self) -> None:
        """End it; more than once is harmless."""


def understood(reply: Packet) -> Packet:
    """The reply, unless it is an error: then that is raised.

    Raises:
        PrivacyError: of the class that the other party names, if it is one of `dpdl.errors`; ChannelError otherwise.
    """
    if reply.kind != "error":
        return reply
    name, message = reply.header.get("error"), reply.header.get("message")
    found = getattr(errors, name, None) if isinstance(name, str) else None
    known = found if isinstance(found, type) and issubclass(found, PrivacyError) else ChannelError
    raise known(f"The other party refused: {message}")


def address_of(packet: Packet) -> str:
    """A request's address, to be read by people."""
    session, step = packet.header.get("session"), packet.header.get("step")
    return f"'{packet.kind}'" if step is None else f"'{packet.kind}', step {step} of the session {session!r}"


def refuse_timeout(timeout: float) -> None:
    """Refuse what is not a time to wait.

    Raises:
        ParameterError: it is not a finite number of seconds above 0.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise ParameterError(f"timeout must be a finite number of seconds > 0, got {timeout!r}.")
