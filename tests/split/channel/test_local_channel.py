"""A channel within the process: what travels is frames, replies belong to requests, errors come out as they are."""

from __future__ import annotations

import pytest
import torch

from dpdl.errors import (
    BudgetExceededError,
    ChannelError,
    ExampleMixingError,
    ManifestError,
    ParameterError,
    PrivacyError,
)
from dpdl.split import frames
from dpdl.split.answering import Answerer
from dpdl.split.channel import Channel, Packet
from dpdl.split.framed_channel import FramedChannel
from dpdl.split.frames import FrameLimits
from dpdl.split.local_channel import LocalChannel


def echo(packet: Packet) -> Packet:
    return Packet(kind=packet.kind, header=packet.header, tensors=packet.tensors)


def test_it_is_a_channel_and_counts_the_bytes_of_frames() -> None:
    local = LocalChannel(echo)
    channel: Channel = local
    z = torch.randn(64, 1568)  # 401 kB
    sent = frames.encode(Packet(kind="step", header={"step": 1}, tensors={"cut": z}))
    for times in (1, 2):
        reply = channel.request("step", {"step": 1}, {"cut": z}, timeout=1.0)
        assert torch.equal(reply.tensors["cut"], z)
        assert reply.tensors["cut"].data_ptr() != z.data_ptr()
        assert (channel.bytes_sent, channel.bytes_received) == (times * len(sent), times * len(sent))
    assert 0 <= len(sent) - 4 * z.numel() < 300


@pytest.mark.parametrize("kind", [BudgetExceededError, ManifestError, ChannelError])
def test_errors_of_the_protocol_come_out_as_the_class_and_words_that_were_raised(kind: type[PrivacyError]) -> None:
    def handler(packet: Packet) -> Packet:
        raise kind("step 4 does not fit")

    with pytest.raises(kind, match="The other party refused: step 4 does not fit"):
        LocalChannel(handler).request("step", {}, {}, timeout=1.0)


def test_words_that_were_made_from_data_stay_where_they_are() -> None:
    def handler(packet: Packet) -> Packet:
        raise ExampleMixingError("row 3 moved by 0.731")

    answer = Answerer(handler)(frames.encode(Packet(kind="probe")))
    assert b"0.731" not in answer
    with pytest.raises(ExampleMixingError, match=r"ExampleMixingError\. The party"):
        LocalChannel(handler).request("probe", {}, {}, timeout=1.0)


def test_a_class_of_no_public_name_is_told_as_the_public_one_above_it() -> None:
    class Inner(ManifestError):
        pass

    def handler(packet: Packet) -> Packet:
        raise Inner("words")

    with pytest.raises(ManifestError, match="words"):
        LocalChannel(handler).request("hello", {}, {}, timeout=1.0)


def test_the_other_party_cannot_make_us_raise_what_is_not_an_error_of_the_library() -> None:
    for name in ("SystemExit", "PrivacyWarning", "annotations", "__all__", "", 3):
        channel = LocalChannel(lambda _, n=name: Packet(kind="error", header={"error": n, "message": "m"}))  # type: ignore[misc]
        with pytest.raises(ChannelError, match="refused: m"):
            channel.request("step", {}, {}, timeout=1.0)


def test_a_handlers_bug_comes_out_as_it_is() -> None:
    def handler(packet: Packet) -> Packet:
        raise ZeroDivisionError("bug")

    with pytest.raises(ZeroDivisionError):
        LocalChannel(handler).request("step", {}, {}, timeout=1.0)


def test_a_reply_of_another_kind_is_refused() -> None:
    with pytest.raises(ChannelError, match="of kind 'other'"):
        LocalChannel(lambda _: Packet(kind="other")).request("step", {}, {}, timeout=1.0)


def test_a_reply_over_the_limit_is_an_error() -> None:
    limits = FrameLimits(max_bytes=2000)
    channel = LocalChannel(lambda p: Packet(kind=p.kind, tensors={"t": torch.zeros(1000)}), limits=limits)
    with pytest.raises(ChannelError, match="max_bytes"):
        channel.request("step", {}, {}, timeout=1.0)


class Mail(FramedChannel):
    """Brings back whatever it is told to."""

    def __init__(self, reply: bytes) -> None:
        super().__init__(limits=FrameLimits())
        self.reply = reply

    def _carry(self, frame: bytes, timeout: float) -> bytes:
        return self.reply

    def close(self) -> None:
        pass


def test_a_reply_to_another_request_is_refused() -> None:
    answer = Answerer(echo)
    old = answer(frames.encode(Packet(kind="step", header={"step": 1})))
    mail = Mail(old)
    assert mail.request("step", {"step": 1}, {}, timeout=1.0).header["step"] == 1
    with pytest.raises(ChannelError, match="another request"):
        mail.request("step", {"step": 2}, {}, timeout=1.0)
    mail.reply = answer(b"not a frame")
    with pytest.raises(ChannelError, match="came damaged: A frame has at least"):
        mail.request("step", {"step": 1}, {}, timeout=1.0)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), True, "1"])
def test_a_timeout_is_a_time(timeout: float) -> None:
    with pytest.raises(ParameterError, match="timeout must be"):
        LocalChannel(echo).request("step", {}, {}, timeout=timeout)


def test_a_closed_channel_says_so() -> None:
    channel = LocalChannel(echo)
    channel.close()
    channel.close()
    with pytest.raises(ChannelError, match="closed"):
        channel.request("step", {}, {}, timeout=1.0)
