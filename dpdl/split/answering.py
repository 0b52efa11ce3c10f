"""The side that is asked: a frame comes in, the handler is called, a frame goes out.

What is refused is said in a packet of kind "error", with the class and the words. Words that were made from data stay
here: only errors of the protocol itself travel in full, of all others the class alone.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from dpdl.errors import (
    BudgetExceededError,
    ChannelError,
    ManifestError,
    PlanExhaustedError,
    PrivacyError,
    StepError,
)
from dpdl.split import frames
from dpdl.split.channel import Handler, Packet
from dpdl.split.frames import DEFAULT_LIMITS, NO_REQUEST, FrameLimits

__all__ = ["Answerer", "FrameHandler", "PeerHandler", "answered", "refusal"]

# Their words are about the run's plan and the order of things, which both parties know.
_TOLD_IN_FULL = (ChannelError, ManifestError, BudgetExceededError, PlanExhaustedError, StepError)


@runtime_checkable
class FrameHandler(Protocol):
    """A handler that also keeps the bytes of its replies (`ReplayGuard`)."""

    def __call__(self, packet: Packet) -> Packet:
        """The reply."""

    def frame(self, packet: Packet, asked: bytes, *, peer: str) -> bytes:
        """The framed reply to a request, of that digest, from a party of that name ("" if unknown)."""


@runtime_checkable
class PeerHandler(Protocol):
    """A handler that wants to know who asks, and says what it can be asked (`ManifestGate`)."""

    kinds: frozenset[str]  # of requests; others need not be brought to it

    def __call__(self, packet: Packet) -> Packet:
        """The reply to nobody knows whom."""

    def answer(self, packet: Packet, *, peer: str) -> Packet:
        """The reply to a party of that name ("" if unknown)."""


class Answerer:
    """Frames to a handler, and its replies to frames.

    Args:
        handler: called with each request; its reply must be of the request's kind.
        limits: that requests and replies must be within.
    """

    def __init__(self, handler: Handler, *, limits: FrameLimits = DEFAULT_LIMITS) -> None:
        self._handler = handler
        self._limits = limits

    def __call__(self, frame: bytes, *, peer: str = "") -> bytes:
        """The reply's frame. A frame that cannot be read gets an error that answers no request.

        Args:
            frame: as it came.
            peer: who sent it, if the connection can tell.
        """
        try:
            packet = frames.decode(frame, self._limits)
        except ChannelError as error:
            return refusal(error)
        asked = frames.digest(frame)
        if isinstance(self._handler, FrameHandler):
            return self._handler.frame(packet, asked, peer=peer)
        return answered(self._handler, packet, asked, limits=self._limits, peer=peer)


def answered(handler: Handler, packet: Packet, asked: bytes, *, limits: FrameLimits, peer: str = "") -> bytes:
    """Call the handler, once; the frame of its reply, or of what it refused.

    Args:
        handler: called with the packet.
        packet: the request.
        asked: its digest.
        limits: that the reply must be within; one that is not becomes an error.
        peer: who asks, if the connection can tell.
    """
    try:
        reply = handler.answer(packet, peer=peer) if isinstance(handler, PeerHandler) else handler(packet)
        if reply.kind not in (packet.kind, "error"):
            raise ChannelError(f"The reply to '{packet.kind}' is of kind '{reply.kind}'. Make it of the same kind.")
        return frames.encode(reply, limits, answering=asked)
    except PrivacyError as error:
        return refusal(error, asked)


def refusal(error: PrivacyError, asked: bytes = NO_REQUEST) -> bytes:
    """The frame that says so."""
    name = next(base.__name__ for base in type(error).__mro__ if base.__module__ in _PUBLIC)
    words = str(error) if isinstance(error, _TOLD_IN_FULL) else f"{name}. The party that raised it knows more."
    return frames.encode(Packet(kind="error", header={"error": name, "message": words[:_WORDS]}), answering=asked)


_PUBLIC = ("dpdl.errors", "accountants.errors")  # where the classes are that the other party knows as well
_WORDS = 4000  # characters of a message
