"""A channel to a party in the same process: through the same frames, so that what travels is what would travel.

>>> from dpdl.split.channel import Packet
>>> channel = LocalChannel(lambda packet: Packet(kind=packet.kind, header={"twice": 2 * packet.header["x"]}))
>>> dict(channel.request("double", {"x": 4}, {}, timeout=1.0).header)
{'twice': 8}
"""

from __future__ import annotations

from typing import final

from dpdl.errors import ChannelError
from dpdl.split.answering import Answerer
from dpdl.split.channel import Handler
from dpdl.split.framed_channel import FramedChannel
from dpdl.split.frames import DEFAULT_LIMITS, FrameLimits

__all__ = ["LocalChannel"]


@final
class LocalChannel(FramedChannel):
    """Calls the handler in this thread, however long it takes. Foreign errors come out as they are.

    Args:
        handler: the other party; a `ReplayGuard` to have repetitions answered as they were.
        limits: that requests and replies must be within.

    Guarantee:
        None: what is sent is seen as it is.
    """

    def __init__(self, handler: Handler, *, limits: FrameLimits = DEFAULT_LIMITS) -> None:
        super().__init__(limits=limits)
        self._answer = Answerer(handler, limits=limits)
        self._closed = False

    def _carry(self, frame: bytes, timeout: float) -> bytes:
        if self._closed:
            raise ChannelError("This channel is closed. Make another LocalChannel.")
        return self._answer(frame)

    def close(self) -> None:
        """End it; more than once is harmless."""
        self._closed = True
