"""Asking again: the same bytes, until there is a reply or time is up; also after a restart, from the outbox."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest
import torch

from dpdl.errors import BudgetExceededError, ChannelError, ParameterError
from dpdl.split import frames
from dpdl.split.answering import Answerer
from dpdl.split.channel import Channel, Packet
from dpdl.split.framed_channel import FramedChannel
from dpdl.split.frames import FrameLimits
from dpdl.split.local_channel import LocalChannel
from dpdl.split.replay import ReplayGuard
from dpdl.split.retrying import RetryingChannel


class Breaking(FramedChannel):
    """Loses the first so many requests or replies, and remembers every frame that it was given."""

    def __init__(self, *, requests: int = 0, replies: int = 0) -> None:
        super().__init__(limits=FrameLimits())
        self.requests, self.replies = requests, replies
        self.frames: list[bytes] = []
        self.timeouts: list[float] = []
        self.calls = 0
        self.answer = Answerer(ReplayGuard(self.handle))

    def handle(self, packet: Packet) -> Packet:
        self.calls += 1
        if packet.header.get("refuse"):
            raise BudgetExceededError("spent")
        return Packet(kind=packet.kind, tensors={"noise": torch.randn(2)})

    def _carry(self, frame: bytes, timeout: float) -> bytes:
        self.frames.append(frame)
        self.timeouts.append(timeout)
        if self.requests:
            self.requests -= 1
            raise ChannelError("the request was lost")
        reply = self.answer(frame)
        if self.replies:
            self.replies -= 1
            raise ChannelError("the reply was lost")
        return reply

    def close(self) -> None:
        pass


def at(step: int, **more: object) -> dict[str, object]:
    return {"session": "a", "step": step, **more}


def test_every_attempt_sends_the_same_bytes_and_one_is_carried_out() -> None:
    line = Breaking(requests=2, replies=2)
    channel: Channel = RetryingChannel(line)
    channel.request("step", at(1), {"x": torch.randn(3)}, timeout=30.0)  # type: ignore[arg-type]
    assert len(line.frames) == 5
    assert len(set(line.frames)) == 1
    assert line.calls == 1
    assert channel.bytes_sent == 5 * len(line.frames[0])


def test_it_gives_up_when_time_is_up_and_says_what_is_unknown() -> None:
    line = Breaking(requests=10**9)
    begun = time.monotonic()
    with pytest.raises(ChannelError, match=r"'step', step 1 of the session 'a' in 0.5 seconds.*lost") as error:
        RetryingChannel(line).request("step", at(1), {}, timeout=0.5)  # type: ignore[arg-type]
    assert 0.1 < time.monotonic() - begun < 1.0
    assert "may have been carried out" in str(error.value)
    assert len(line.frames) > 2
    assert all(0 < timeout <= 0.5 for timeout in line.timeouts)


def test_attempts_have_a_time_of_their_own() -> None:
    line = Breaking(requests=1)
    RetryingChannel(line, attempt_timeout=2.0).request("step", at(1), {}, timeout=30.0)  # type: ignore[arg-type]
    assert line.timeouts == [2.0, 2.0]
    with pytest.raises(ParameterError, match="timeout must be"):
        RetryingChannel(line, attempt_timeout=0.0)
    with pytest.raises(ParameterError, match="FramedChannel"):
        RetryingChannel(RetryingChannel(line))  # type: ignore[arg-type]


def test_what_the_other_party_refuses_is_not_asked_again() -> None:
    line = Breaking()
    with pytest.raises(BudgetExceededError):
        RetryingChannel(line).request("step", at(1, refuse=True), {}, timeout=30.0)  # type: ignore[arg-type]
    assert len(line.frames) == 1


def test_a_client_that_was_killed_resumes_with_the_bytes_that_it_had_sent(tmp_path: Path) -> None:
    outbox = tmp_path / "request.frame"
    line = Breaking()
    channel = RetryingChannel(line, outbox=outbox)
    assert channel.pending is None
    assert channel.resume(timeout=1.0) is None
    reply = channel.request("step", at(1), {"x": torch.randn(3)}, timeout=5.0)  # type: ignore[arg-type]

    again = RetryingChannel(line, outbox=outbox)  # the next process
    assert again.pending is not None
    assert again.pending.header["step"] == 1
    resumed = again.resume(timeout=5.0)
    assert resumed is not None
    assert torch.equal(resumed.tensors["noise"], reply.tensors["noise"])
    assert line.frames[0] == line.frames[1]
    assert line.calls == 1
    assert again.pending is None
    again.request("step", at(2), {}, timeout=5.0)  # type: ignore[arg-type]
    assert line.calls == 2


def test_a_request_is_in_the_outbox_before_it_is_sent(tmp_path: Path) -> None:
    outbox = tmp_path / "request.frame"
    seen: list[bytes] = []

    def handler(packet: Packet) -> Packet:
        seen.append(outbox.read_bytes())
        return Packet(kind=packet.kind)

    channel = RetryingChannel(LocalChannel(handler), outbox=outbox)
    for step in (1, 2):
        channel.request("step", at(step), {"x": torch.tensor(step)}, timeout=5.0)  # type: ignore[arg-type]
    assert [frames.decode(frame).header["step"] for frame in seen] == [1, 2]
    assert stat.S_IMODE(outbox.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["request.frame"]


def test_drawing_again_what_may_have_been_sent_is_refused(tmp_path: Path) -> None:
    outbox = tmp_path / "request.frame"
    line = Breaking()
    first = {"x": torch.randn(3)}
    RetryingChannel(line, outbox=outbox).request("step", at(1), first, timeout=5.0)  # type: ignore[arg-type]
    again = RetryingChannel(line, outbox=outbox)
    with pytest.raises(ChannelError, match="do not draw it again"):
        again.request("step", at(1), {"x": torch.randn(3)}, timeout=5.0)  # type: ignore[arg-type]
    assert len(line.frames) == 1
    again.request("step", at(1), first, timeout=5.0)  # type: ignore[arg-type]
    assert line.calls == 1


def test_an_outbox_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    outbox = tmp_path / "request.frame"
    outbox.write_bytes(b"half a request")
    with pytest.raises(ChannelError, match="holds no request"):
        RetryingChannel(Breaking(), outbox=outbox)
    line = Breaking()
    channel = RetryingChannel(line, outbox=tmp_path / "missing" / "request.frame")
    with pytest.raises(ChannelError, match="Nothing was sent"):
        channel.request("step", at(1), {}, timeout=5.0)  # type: ignore[arg-type]
    assert not line.frames
