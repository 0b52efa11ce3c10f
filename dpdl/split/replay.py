"""No request is carried out twice: asked again, it gets the bytes that it got before.

    guard = ReplayGuard(server.handle, "replies.db")
    serve("10.0.0.5:50051", guard, tls=tls)

A connection that breaks leaves open whether the request arrived. Sending it again is right only if the other party does
not act on it again: a second run would draw noise anew for data that was released already, and somebody who has both
replies can average the noise away. So each request has an address (session, kind, step), which is written down before
the handler is called, and each reply is written down before it leaves. Under the same address

- the same bytes get the same reply, for as long as it is kept, over restarts if there is a path;
- while the first is being worked on, a second one waits, and gets that reply;
- other bytes are refused: another draw under the number of one that was answered;
- a handler that was begun and did not come to an end (killed, or a bug) is not begun again.

A party that shows a certificate is the client that it says it is, or a relay that was named; it is asked about before
anything is written down, and so is the kind, so that strangers' requests take no room.

Within a session and kind, steps go up. What a handler refuses (a `PrivacyError`) is a reply like any other.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import final

from dpdl.errors import ChannelError, ParameterError
from dpdl.split import frames
from dpdl.split.answering import PeerHandler, answered, refusal
from dpdl.split.channel import Handler, Packet
from dpdl.split.frames import DEFAULT_LIMITS, FrameLimits
from dpdl.split.reply_store import Address, ReplyStore

__all__ = ["ReplayGuard"]

_LARGEST_STEP = 2**63 - 1  # SQLite's integers
_LONGEST_SESSION = 256  # characters
_MOST_VISITS = 1000  # of one step: "step", "step.1", ...


@final
class ReplayGuard:
    """A handler that calls another one at most once for each address. For any number of threads; one at a time.

    Args:
        handler: called with each new request, never with two at once.
        path: a file to keep replies in; None: in memory, and a server that restarts has forgotten them.
        limits: that replies must be within.
        keep: of how many steps, of each session and kind, replies are kept. A party that waits for each reply needs 1.
        consecutive: kinds whose steps go up by exactly one. Others may leave some out: a step that was spent, and
            failed before it was sent.
        max_streams: how many pairs of session and kind there may be of one peer, so that nobody can fill the disk, or
            lock others out.
        kinds: that may be asked, without the number of the visit; None: what the handler says (`ManifestGate.kinds`),
            or if it says nothing, any.
        relays: peers that may ask for other clients, as hops of a chain do. All others ask as the client whose name is
            in their certificate.

    Guarantee:
        No noise is drawn twice for one address: a request that is sent again gets the same reply, or an error.

    Raises:
        ChannelError: the file cannot be used.
        ParameterError: keep or max_streams is not positive.
    """

    def __init__(
        self,
        handler: Handler,
        path: str | os.PathLike[str] | None = None,
        *,
        limits: FrameLimits = DEFAULT_LIMITS,
        keep: int = 2,
        consecutive: Iterable[str] = (),
        max_streams: int = 1024,
        kinds: Iterable[str] | None = None,
        relays: Iterable[str] = (),
    ) -> None:
        for name, value in (("keep", keep), ("max_streams", max_streams)):
            if type(value) is not int or value <= 0:
                raise ParameterError(f"{name} must be a whole number > 0, got {value!r}.")
        self._handler = handler
        self._limits = limits
        self._keep = keep
        self._consecutive = frozenset(consecutive)
        self._max_streams = max_streams
        said = handler.kinds if isinstance(handler, PeerHandler) else None
        self._kinds = said if kinds is None else frozenset(kinds)
        self._relays = frozenset(relays)
        self._store = ReplyStore(path)
        self._turn = threading.Lock()

    def __call__(self, packet: Packet) -> Packet:
        """The reply to a packet, the one of the first time if it was asked before; of kind "error" if refused."""
        asked = frames.digest(frames.encode(packet, self._limits))
        return frames.decode(self.frame(packet, asked, peer=""), self._limits)

    def frame(self, packet: Packet, asked: bytes, *, peer: str = "") -> bytes:
        """The reply's frame.

        Args:
            packet: the request.
            asked: its frame's digest.
            peer: who asks, if the connection can tell. A session is of the one who began it.
        """
        try:
            address = _address(packet)
            self._refuse_kind(packet.kind)
            self._refuse_other_client(packet, peer)
            with self._turn:
                return self._answer(packet, address, asked, peer)
        except ChannelError as error:
            return refusal(error, asked)

    def _answer(self, packet: Packet, address: Address, asked: bytes, peer: str) -> bytes:
        owner = self._store.peer(address.session)
        if owner not in (None, peer):
            raise ChannelError(f"The session {address.session!r} is another party's. Choose another name for yours.")
        kept = self._store.kept(address)
        if kept is None:
            self._refuse_disorder(address, peer)
            self._store.begin(address, request=asked, peer=peer)
            reply = answered(self._handler, packet, asked, limits=self._limits, peer=peer)
            self._store.finish(address, reply, keep=self._keep)
            return reply
        if kept.request != asked:
            raise ChannelError(
                f"{address} was asked before with other content. A repetition has to be the same bytes: what was drawn "
                "anew would be a second release. Resume from the outbox, or begin a new session."
            )
        if kept.reply is None:
            raise ChannelError(
                f"{address} was begun and did not come to an end; what it has spent is spent, and it is not begun "
                "again. Begin a new session from the last checkpoint of both parties."
            )
        return kept.reply

    def _refuse_kind(self, kind: str) -> None:
        name, dot, visit = kind.partition(".")
        numbered = not dot or (visit.isdecimal() and visit.isascii() and str(int(visit[:9])) == visit)
        if self._kinds is not None and (
            name not in self._kinds or not numbered or (dot and int(visit) >= _MOST_VISITS)
        ):
            raise ChannelError(f"Requests of kind {kind[:80]!r} are not answered here, but {sorted(self._kinds)}.")

    def _refuse_other_client(self, packet: Packet, peer: str) -> None:
        client = packet.header.get("client")
        if peer and client not in (None, peer) and peer not in self._relays:
            raise ChannelError(
                f"A request of '{peer}', as its certificate says, is for the client {str(client)[:80]!r}. A client is "
                "called as in its certificate; a hop that asks for others is named in ReplayGuard(relays=...)."
            )

    def _refuse_disorder(self, address: Address, peer: str) -> None:
        last = self._store.last_step(address)
        if last is None:
            if self._store.streams(peer) >= self._max_streams:
                raise ChannelError(
                    f"There are {self._max_streams} pairs of session and kind of {peer!r} already. Raise max_streams, "
                    "or give the server a new file of replies."
                )
            return
        if address.step <= last:
            raise ChannelError(f"{address} comes too late: step {last} was begun, and no reply to it is kept.")
        if address.kind in self._consecutive and address.step != last + 1:
            raise ChannelError(f"{address} is out of order: after step {last} comes {last + 1}.")

    def close(self) -> None:
        """Let go of the file, once nobody is being answered; more than once is harmless."""
        with self._turn:
            self._store.close()


def _address(packet: Packet) -> Address:
    session, step = packet.header.get("session"), packet.header.get("step")
    if isinstance(session, str) and len(session) > _LONGEST_SESSION:
        raise ChannelError(f"A session's name has at most {_LONGEST_SESSION} characters, got {len(session)}.")
    if not isinstance(session, str) or type(step) is not int or not 0 <= step <= _LARGEST_STEP:
        raise ChannelError(
            f"The request '{packet.kind}' has no address: its header needs a session, a text, and a step, a whole "
            f"number >= 0; got {session!r} and {step!r}."
        )
    return Address(session=session, kind=packet.kind, step=step)
