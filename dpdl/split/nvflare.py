"""Frames over NVFlare's Collab API [1]: its sites, its provisioning and TLS; our frames and guards.

In the module of the site that answers, and in that of the site that asks:

    answer = published(ReplayGuard(server.handle, "replies.db"))

    @collab.main
    def drive():
        channel = CollabChannel(collab.get_clients(["hospital"])[0])
        SplitClient(graph, plan=plan, channels={"server": channel}, ...).run()

Collab takes tensors itself, by its own serialiser; here only bytes go through it, so that what is checked, counted and
repeated is the same as on every other channel. Needs `pip install dpdl[nvflare]` (2.9: the API is new, and moves).

References:
    [1] NVIDIA FLARE 2.9, "Collab API". nvflare.readthedocs.io
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, final

from dpdl.errors import ChannelError, ParameterError
from dpdl.split.answering import Answerer, FrameHandler
from dpdl.split.channel import Handler
from dpdl.split.framed_channel import FramedChannel
from dpdl.split.frames import DEFAULT_LIMITS, FrameLimits
from dpdl.split.replay import ReplayGuard

__all__ = ["CollabChannel", "published"]

_log = logging.getLogger(__name__)
FUNCTION = "answer"  # what sites publish


@final
class CollabChannel(FramedChannel):
    """A channel to a site that publishes `answer`.

    Args:
        site: Collab's proxy of it, from `collab.clients`, `collab.get_clients` or `collab.server`.
        limits: that requests and replies must be within.

    Raises:
        ParameterError: nvflare is not installed.
    """

    def __init__(self, site: Any, *, limits: FrameLimits = DEFAULT_LIMITS) -> None:
        super().__init__(limits=limits)
        self._site = site
        self._errors = _errors()
        self._closed = False

    def _carry(self, frame: bytes, timeout: float) -> bytes:
        if self._closed:
            raise ChannelError(f"The channel to the site '{self._site.name}' is closed. Make another CollabChannel.")
        try:
            reply = getattr(self._site(timeout=timeout), FUNCTION)(frame)
        except self._errors as error:
            raise ChannelError(
                f"The site '{self._site.name}' failed, or did not answer within {timeout:g} seconds "
                f"({type(error).__name__}); its log may say why."
            ) from error
        if not isinstance(reply, bytes):
            raise ChannelError(f"The site '{self._site.name}' answered with {type(reply).__name__}, not with a frame.")
        return reply

    def close(self) -> None:
        """End it; more than once is harmless. The site's connection is NVFlare's."""
        self._closed = True


def published(handler: Handler, *, limits: FrameLimits = DEFAULT_LIMITS) -> Callable[[bytes], bytes]:
    """A function for a site to publish under the name `answer`.

    Args:
        handler: called with each request. One that is not a `ReplayGuard` gets one around it, in memory.
        limits: that requests and replies must be within.

    Raises:
        ParameterError: nvflare is not installed.
    """
    collab = _collab()
    guarded = handler if isinstance(handler, FrameHandler) else ReplayGuard(handler, limits=limits)
    answerer = Answerer(guarded, limits=limits)

    def answer(frame: bytes) -> bytes:
        whole = False
        try:
            if not isinstance(frame, bytes):
                raise ChannelError(f"A frame is bytes, got {type(frame).__name__}.")
            reply = answerer(frame, peer=str(collab.caller))
            whole = True
            return reply
        finally:
            if not whole:  # NVFlare sends the error's words and traceback, and they may be made from data
                _log.exception("The handler failed.")
                raise ChannelError("The handler failed; its log says why.") from None

    answer.__annotations__ = {"frame": bytes, "return": bytes}
    decorated: Callable[[bytes], bytes] = collab.publish(answer)
    return decorated


def _collab() -> Any:
    try:
        from nvflare.collab import collab
    except ImportError as error:
        raise ParameterError(
            "A channel over NVFlare needs that package: pip install 'dpdl[nvflare]'. Between two machines without it "
            "there is GrpcChannel."
        ) from error
    return collab


def _errors() -> tuple[type[Exception], ...]:
    """What a call through Collab raises."""
    _collab()
    from nvflare.collab.api.exceptions import CollabCallError, RunAborted

    return (CollabCallError, RunAborted, TimeoutError)
