"""Whatever bytes come, a server answers with an error or to what was asked, and takes no more memory than it said."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpdl.errors import ChannelError
from dpdl.split import frames
from dpdl.split.answering import Answerer
from dpdl.split.channel import Packet
from dpdl.split.frames import FrameLimits
from tests.split.channel.test_frames import body_of, sealed, told

# What reading a header of so many bytes may take: a list of one number is 3 bytes, and 88 as an object.
A_HEADER_BYTE_IN_MEMORY = 64
SLACK = 200_000


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, packet: Packet) -> Packet:
        self.calls += 1
        return Packet(kind=packet.kind, tensors=packet.tensors)


def answer_to(frame: bytes, handler: Counter) -> Packet:
    return frames.decode(Answerer(handler)(frame))


names = st.text(max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3))
lengths = st.integers(-2, 4) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "BF16", "BOOL", "I64", "U8", "F8_E4M3", ""]) | anything,
        "shape": st.lists(lengths, max_size=4) | anything,
        "data_offsets": st.lists(lengths, min_size=2, max_size=2) | anything,
    }
)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(noise: bytes) -> None:
    handler = Counter()
    for frame in (noise, b"dpdl" + noise, sealed(noise), sealed(struct.pack("<Q", max(0, len(noise) - 8)) + noise)):
        assert answer_to(frame, handler).kind == "error"
    assert handler.calls == 0


@settings(max_examples=300, deadline=None)
@given(
    tensors=st.dictionaries(names, entries | anything, max_size=3),
    header=anything,
    kind=anything,
    data=st.binary(max_size=40),
)
def test_random_structures_are_refused_or_understood(tensors: Any, header: Any, kind: Any, data: bytes) -> None:
    handler = Counter()
    reply = answer_to(sealed(body_of(told(tensors, kind=kind, header=header), data)), handler)
    assert (reply.kind == "error" and reply.header["error"] == "ChannelError") == (handler.calls == 0)


def test_damaged_frames_are_refused_even_with_a_new_digest() -> None:
    """A frame changed at random either is another valid one, or is refused; nothing else is raised."""
    chance = random.Random(3)
    tensors = {"cut": torch.randn(3, 2), "on": torch.tensor([True, False]), "none": torch.zeros(0)}
    good = frames.encode(Packet(kind="step", header={"session": "a", "step": 4, "q": 0.5}, tensors=tensors))
    refused = 0
    for _ in range(3000):
        body = bytearray(good[80:])
        for _ in range(chance.choice([1, 1, 2, 8])):
            change = chance.randrange(3)
            place = chance.randrange(len(body))
            if change == 0:
                body[place] = chance.randrange(256)
            elif change == 1:
                del body[place : place + chance.randrange(1, 9)]
            else:
                body[place:place] = bytes(chance.choices(b'{}[]",:0123456789eE-\\u', k=chance.randrange(1, 9)))
        try:
            packet = frames.decode(sealed(bytes(body)))
        except ChannelError:
            refused += 1
            continue
        assert frames.decode(frames.encode(packet)).kind == packet.kind
    assert refused > 2000


def hostile_frames() -> dict[str, bytes]:
    """Small frames that announce much, and large headers that would swell."""
    f32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    megabyte = 2**20
    return {
        "a length of 2^62": struct.pack("<4sIQ64x", b"dpdl", 1, 2**62),
        "a header of 2^40": sealed(struct.pack("<Q", 2**40)),
        "a tensor of 2^50": sealed(body_of(told({"a": {**f32, "shape": [2**48], "data_offsets": [0, 2**50]}}))),
        "an empty tensor of 2^62 columns": sealed(
            body_of(told({"a": {**f32, "shape": [0, 2**62], "data_offsets": [0, 0]}}))
        ),
        "lists in lists": sealed(body_of(b"[" * (megabyte - 8))),
        "many lists": sealed(body_of(b"[" + b"[1]," * (megabyte // 4 - 8) + b"1]")),
        "many objects": sealed(body_of(b"[" + b"{}," * (megabyte // 3 - 8) + b"1]")),
        "many names": sealed(body_of(b"{" + b",".join(b'"%x":{}' % n for n in range(75_000)) + b"}")),
        "many tensors": sealed(body_of(json.dumps(told({str(n): f32 for n in range(10_000)})).encode())),
        "metadata in metadata": sealed(body_of({"__metadata__": {"dpdl": "[" * 900_000}})),
        "a long number": sealed(body_of(b"1" * megabyte)),
        "a long text": sealed(body_of(b'"' + b"a" * (megabyte - 8) + b'"')),
    }


@pytest.mark.parametrize("name", hostile_frames())
def test_hostile_frames_take_no_more_memory_than_the_cap(name: str) -> None:
    frame = hostile_frames()[name]
    limits = FrameLimits()
    tracemalloc.start()
    try:
        with pytest.raises(ChannelError):
            frames.decode(frame, limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"{name}: frame {len(frame)} bytes, peak {peak}")
    assert peak <= SLACK + len(frame) + A_HEADER_BYTE_IN_MEMORY * min(len(frame), limits.max_header_bytes)
    assert peak < limits.max_bytes


def test_a_frame_over_the_cap_is_refused_before_anything_is_copied() -> None:
    frame = frames.encode(Packet(kind="x", tensors={"a": torch.zeros(2**20)}))
    tracemalloc.start()
    try:
        with pytest.raises(ChannelError, match="over max_bytes"):
            frames.decode(frame, FrameLimits(max_bytes=2**20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50_000


def test_a_good_frame_takes_its_own_size_once() -> None:
    frame = frames.encode(Packet(kind="x", tensors={"a": torch.zeros(2**20)}))
    tracemalloc.start()
    try:
        packet = frames.decode(frame)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert packet.tensors["a"].numel() == 2**20
    assert len(frame) <= peak + 200 < len(frame) + SLACK
