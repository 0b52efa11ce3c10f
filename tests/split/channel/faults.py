"""A line that fails at random: it loses, repeats, mixes up, cuts, damages and delays frames, from a seed.

    line = FaultyLine(lambda: ReplayGuard(handler, path), faults=FAULTS, rate=0.3, seed=7)
    channel = RetryingChannel(line, outbox=outbox)

`restart_server` makes a new guard from the same file, as after a crash; whoever holds the line does the client's part.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from dpdl.errors import ChannelError
from dpdl.split.answering import Answerer
from dpdl.split.framed_channel import FramedChannel
from dpdl.split.frames import FrameLimits
from dpdl.split.replay import ReplayGuard

FAULTS = (
    "lose the request",
    "lose the reply",
    "repeat the request",
    "bring an old request again",
    "bring an old reply instead",
    "cut the request",
    "cut the reply",
    "damage the request",
    "damage the reply",
    "be slow",
    "be too slow",
    "restart the server",
)
_REMEMBERED = 20  # frames that may turn up again


class FaultyLine(FramedChannel):
    """Frames to a guard and back, each time with one of the faults or none."""

    def __init__(
        self, guard: Callable[[], ReplayGuard], *, faults: Sequence[str] = FAULTS, rate: float = 0.5, seed: int = 0
    ) -> None:
        super().__init__(limits=FrameLimits())
        self._make_guard = guard
        self._guard = guard()
        self._answer = Answerer(self._guard)
        self._faults = faults
        self._rate = rate
        self._chance = random.Random(seed)
        self._requests: list[bytes] = []
        self._replies: list[bytes] = []
        self.happened: dict[str, int] = {}

    def restart_server(self) -> None:
        self._guard.close()
        self._guard = self._make_guard()
        self._answer = Answerer(self._guard)

    def _carry(self, frame: bytes, timeout: float) -> bytes:
        fault = self._chance.choice(self._faults) if self._chance.random() < self._rate else "none"
        self.happened[fault] = self.happened.get(fault, 0) + 1
        old_request = self._chance.choice(self._requests) if self._requests else frame
        old_reply = self._chance.choice(self._replies) if self._replies else b""
        self._requests = [*self._requests, frame][-_REMEMBERED:]
        if fault == "lose the request":
            raise ChannelError("no reply in time")
        if fault == "repeat the request":
            self._answer(frame)
        if fault == "bring an old request again":
            self._answer(old_request)
        if fault == "restart the server":
            self.restart_server()
        if fault == "be slow":
            time.sleep(0.002)
        if fault == "cut the request":
            frame = frame[: self._chance.randrange(len(frame))]
        if fault == "damage the request":
            frame = self._damaged(frame)
        reply = self._answer(frame)
        self._replies = [*self._replies, reply][-_REMEMBERED:]
        if fault in ("lose the reply", "be too slow"):
            raise ChannelError("no reply in time")
        if fault == "bring an old reply instead":
            return old_reply
        if fault == "cut the reply":
            return reply[: self._chance.randrange(len(reply))]
        return self._damaged(reply) if fault == "damage the reply" else reply

    def _damaged(self, frame: bytes) -> bytes:
        torn = bytearray(frame)
        for _ in range(self._chance.choice([1, 2, 9])):
            torn[self._chance.randrange(len(torn))] ^= 1 << self._chance.randrange(8)
        return bytes(torn)

    def close(self) -> None:
        self._guard.close()
