"""A channel that asks again where the first one gave up, with the very same bytes.

    channel = RetryingChannel(GrpcChannel.connect(address, tls=tls), outbox="request.frame")

A frame is made once; every attempt sends it as it is, and so does a client that was killed and started again, from its
outbox. The other party must answer repetitions as it did before (`ReplayGuard`; `serve` always has one).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import final

from torch import Tensor

from dpdl.errors import ChannelError, ParameterError
from dpdl.split import frames
from dpdl.split.channel import Packet, Value
from dpdl.split.framed_channel import FramedChannel, address_of, refuse_timeout, understood
from dpdl.split.whole_file import replace_file

__all__ = ["RetryingChannel"]

_FIRST_WAIT = 0.05  # seconds between two attempts, at first
_LONGEST_WAIT = 1.0


@final
class RetryingChannel:
    """Another channel, asked until it answers or time is up.

    Args:
        channel: to ask.
        attempt_timeout: seconds for each attempt; None: all that is left.
        outbox: a file that holds the last request from before it is first sent, so that a client that was killed can
            `resume`; None: nothing is kept.

    Raises:
        ChannelError: the outbox holds something else.
        ParameterError: attempt_timeout is not a time.
    """

    def __init__(
        self,
        channel: FramedChannel,
        *,
        attempt_timeout: float | None = 10.0,
        outbox: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(channel, FramedChannel):
            raise ParameterError(f"channel must be a FramedChannel such as GrpcChannel, got {type(channel).__name__}.")
        if attempt_timeout is not None:
            refuse_timeout(attempt_timeout)
        self._channel = channel
        self._attempt_timeout = attempt_timeout
        self._outbox = None if outbox is None else Path(outbox).absolute()
        self._pending = self._read_outbox()

    @property
    def bytes_sent(self) -> int:
        """Bytes of all requests so far, as framed; those that were sent again count again."""
        return self._channel.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes of all replies so far, as framed."""
        return self._channel.bytes_received

    @property
    def pending(self) -> Packet | None:
        """The last request that a client before this one has written down, until something is asked."""
        return None if self._pending is None else frames.decode(self._pending, self._channel.limits)

    def request(
        self, kind: str, header: Mapping[str, Value], tensors: Mapping[str, Tensor], *, timeout: float
    ) -> Packet:
        """Ask until there is a reply, for at most `timeout` seconds in all; otherwise as `Channel.request`.

        Raises:
            ChannelError: there was none; or the same address is in the outbox with other content.
            PrivacyError: of whatever class, as the other party has raised it.
        """
        refuse_timeout(timeout)
        packet = Packet(kind=kind, header=header, tensors=tensors)
        frame = frames.encode(packet, self._channel.limits)
        pending = self.pending
        if pending is not None and _address(pending) == _address(packet) and frame != self._pending:
            raise ChannelError(
                f"{address_of(packet)} is in the outbox {self._outbox} with other content: it was made before this "
                "process began, and may have been sent. Call resume() for its reply; do not draw it again."
            )
        if self._outbox is not None and frame != self._pending:
            _write(self._outbox, frame)
        self._pending = None
        return self._ask(frame, packet, timeout)

    def resume(self, *, timeout: float) -> Packet | None:
        """Send what is in the outbox again, and wait for its reply; None if there is nothing.

        Raises:
            ChannelError, PrivacyError: as `request`.
        """
        refuse_timeout(timeout)
        pending = self.pending
        if pending is None or self._pending is None:
            return None
        reply = self._ask(self._pending, pending, timeout)
        self._pending = None
        return reply

    def close(self) -> None:
        """End it; more than once is harmless."""
        self._channel.close()

    def _ask(self, frame: bytes, packet: Packet, timeout: float) -> Packet:
        deadline = time.monotonic() + timeout
        wait, attempts = _FIRST_WAIT, 0
        while True:
            attempts += 1
            left = max(deadline - time.monotonic(), 1e-3)
            try:
                reply = self._channel.exchange(frame, timeout=min(left, self._attempt_timeout or left))
                break
            except ChannelError as error:
                if time.monotonic() + wait >= deadline:
                    raise ChannelError(
                        f"No reply to {address_of(packet)} in {timeout:g} seconds and {attempts} attempts. It may have "
                        f"been carried out: ask again with the same bytes, or not at all. The last attempt: {error}"
                    ) from error
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
        return understood(reply)

    def _read_outbox(self) -> bytes | None:
        if self._outbox is None:
            return None
        try:
            frame = self._outbox.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ChannelError(f"The outbox {self._outbox} cannot be read: {error.strerror}.") from error
        try:
            frames.decode(frame, self._channel.limits)
        except ChannelError as error:
            raise ChannelError(f"The outbox {self._outbox} holds no request: {error} Give another path.") from error
        return frame


def _address(packet: Packet) -> tuple[object, ...]:
    return packet.kind, packet.header.get("session"), packet.header.get("step")


def _write(path: Path, frame: bytes) -> None:
    try:
        replace_file(path, frame)
    except OSError as error:
        raise ChannelError(f"The outbox {path} cannot be written: {error.strerror}. Nothing was sent.") from error
