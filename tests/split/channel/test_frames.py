"""Frames: exact both ways, the same bytes for the same packet, and strict about everything that comes in."""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dpdl.errors import ChannelError, ParameterError
from dpdl.split import frames
from dpdl.split.channel import Packet
from dpdl.split.frames import FrameLimits

PREFIX = 4 + 4 + 8 + 32 + 32
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def sealed(body: bytes, *, version: int = 1, magic: bytes = b"dpdl", answering: bytes = bytes(32)) -> bytes:
    """A frame around any body, with the right digest: what a hostile party would send."""
    digest = hashlib.sha256(answering + body).digest()
    return struct.pack("<4sIQ32s32s", magic, version, len(body), answering, digest) + body


def body_of(told: Any, data: bytes = b"") -> bytes:
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    return struct.pack("<Q", len(text)) + text + data


def told(tensors: dict[str, Any] | None = None, *, kind: Any = "step", header: Any = None) -> dict[str, Any]:
    ours = json.dumps({"kind": kind, "header": {} if header is None else header})
    return {"__metadata__": {"dpdl": ours}, **(tensors or {})}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5,), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_by_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    raw = torch.randint(-1000, 1000, shape)
    tensor = raw > 0 if dtype is torch.bool else raw.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = frames.decode(frames.encode(Packet(kind="step", tensors={"cut": tensor, "other": raw})))
    found = back.tensors["cut"]
    assert (found.dtype, found.shape, bits(found)) == (dtype, tensor.shape, bits(tensor))
    assert bits(back.tensors["other"]) == bits(raw)


def test_numbers_without_a_value_keep_their_bits() -> None:
    odd = torch.tensor([0x7FC00001, 0x7F800001, 0x80000000, 1, 0xFF800000], dtype=torch.int64).to(torch.int32)
    floats = odd.view(torch.float32)
    assert bits(frames.decode(frames.encode(Packet(kind="x", tensors={"t": floats}))).tensors["t"]) == bits(floats)


def test_views_are_sent_as_what_they_show() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    views = {"t": whole.t(), "half": whole[::2, 1::2], "row": whole[1], "wide": torch.ones(()).expand(3, 2)}
    back = frames.decode(frames.encode(Packet(kind="x", tensors=views))).tensors
    assert all(torch.equal(back[name], view) for name, view in views.items())
    parameter = torch.nn.Parameter(torch.ones(2))
    assert not frames.decode(frames.encode(Packet(kind="x", tensors={"p": parameter}))).tensors["p"].requires_grad


def test_what_came_is_writable_and_its_own() -> None:
    frame = frames.encode(Packet(kind="x", tensors={"a": torch.ones(4), "b": torch.zeros(4)}))
    back = frames.decode(frame)
    back.tensors["a"].add_(1)
    assert torch.equal(back.tensors["b"], torch.zeros(4))
    assert torch.equal(frames.decode(frame).tensors["a"], torch.ones(4))


def test_plain_values_come_back_as_they_were() -> None:
    header = {"none": None, "yes": True, "n": -(2**63), "f": 0.1, "tiny": 5e-324, "minus": -0.0, "text": "ε\x00\n"}
    back = frames.decode(frames.encode(Packet(kind="ü", header=header)))
    assert back.kind == "ü"
    assert back.header == header
    assert {name: type(value) for name, value in back.header.items()} == {k: type(v) for k, v in header.items()}
    assert str(back.header["minus"]) == "-0.0"


def test_the_same_packet_is_the_same_bytes_in_any_order() -> None:
    one = Packet(kind="x", header={"a": 1, "b": 2}, tensors={"p": torch.ones(2), "q": torch.zeros(3)})
    two = Packet(kind="x", header={"b": 2, "a": 1}, tensors={"q": torch.zeros(3), "p": torch.ones(2)})
    assert frames.encode(one) == frames.encode(two)
    assert frames.encode(one) == frames.encode(frames.decode(frames.encode(one)))


def test_the_body_is_a_safetensors_file() -> None:
    """Oracle: the package itself reads what we write, and we read what it writes."""
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(2).to(torch.bfloat16),
        "c": torch.randn(5, dtype=torch.float64),
        "d": torch.tensor([True, False, True]),
        "e": torch.tensor(7),
        "f": torch.randn(0, 3).to(torch.float16),
    }
    frame = frames.encode(Packet(kind="x", tensors=tensors))
    theirs = safetensors.torch.load(frame[PREFIX:])
    assert all(
        bits(theirs[name]) == bits(tensor) and theirs[name].shape == tensor.shape for name, tensor in tensors.items()
    )
    assert set(theirs) == set(tensors)
    written = safetensors.torch.save(tensors, metadata={"dpdl": json.dumps({"kind": "y", "header": {"n": 1}})})
    back = frames.decode(sealed(written))
    assert (back.kind, dict(back.header)) == ("y", {"n": 1})
    assert all(bits(back.tensors[name]) == bits(tensor) for name, tensor in tensors.items())


def test_a_reply_names_the_request_that_it_answers() -> None:
    request = frames.encode(Packet(kind="x"))
    reply = frames.encode(Packet(kind="x"), answering=frames.digest(request))
    assert frames.answers(request) == frames.NO_REQUEST
    assert frames.answers(reply) == frames.digest(request)
    assert frames.digest(request) == hashlib.sha256(bytes(32) + request[PREFIX:]).digest()
    torn = bytearray(reply)
    torn[20] ^= 1  # in the digest of the request
    with pytest.raises(ChannelError, match="damaged"):
        frames.decode(bytes(torn))


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = bytes(8)


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (b"", "cut off"),
        (bytes(PREFIX - 1), "cut off"),
        (sealed(body_of(told()), magic=b"\x80\x04pk"), "not from a party"),
        (sealed(body_of(told()), version=2), "version 2"),
        (sealed(body_of(told()))[:-1], "says that its body has"),
        (sealed(body_of(told())) + b"x", "says that its body has"),
        (sealed(b"1234567"), "too few"),
        (sealed(struct.pack("<Q", 2**63)), "header of a frame has"),
        (sealed(struct.pack("<Q", 100) + b"{}"), "should have 100"),
        (sealed(body_of(b"{")), "not JSON"),
        (sealed(body_of(b"[" * 100_000)), "not JSON"),
        (sealed(body_of(b"\xff\xfe")), "not JSON"),
        (sealed(body_of(b"1" * 5000)), "not JSON"),
        (sealed(body_of([1])), "must be an object"),
        (sealed(body_of({})), "no __metadata__"),
        (sealed(body_of({"__metadata__": {"dpdl": 3}})), "no __metadata__"),
        (sealed(body_of({"__metadata__": {"dpdl": "{}", "more": ""}})), "no __metadata__"),
        (sealed(body_of({"__metadata__": {"dpdl": "{}"}})), "kind and a header"),
        (sealed(body_of(told(header=[]))), "kind and a header"),
        (sealed(body_of(told(kind=""))), "kind must be"),
        (sealed(body_of(told(kind=7))), "kind must be"),
        (sealed(body_of(told(kind="\ud800"))), "kind must be"),
        (sealed(body_of(told(header={"a": [1]}))), "a header takes"),
        (sealed(body_of(told(header={"a": 2**63}))), "a header takes"),
        (sealed(body_of(told(header={"a": "\ud800"}))), "a header takes"),
        (sealed(body_of(told(header={"a": float("nan")}))), "NaN"),
        (sealed(body_of(told(header={"x" * 300: 1}))), "name must be"),
        (sealed(body_of({"__metadata__": {"dpdl": '{"kind": "x", "header": {"a": 1e999}}'}})), "a header takes"),
        (sealed(body_of(b'{"__metadata__": {"dpdl": "{\\"kind\\": \\"a\\", \\"kind\\": \\"b\\"}"}}')), "stands twice"),
        (
            sealed(
                body_of(json.dumps(told({"a": F32})).encode()[:-1] + b', "a": ' + json.dumps(F32).encode() + b"}", DATA)
            ),
            "stands twice",
        ),
        (sealed(body_of(told({"a": 3}))), "dtype, shape and data_offsets"),
        (sealed(body_of(told({"a": {**F32, "code": "x"}}), DATA)), "dtype, shape and data_offsets"),
        (sealed(body_of(told({"a": {**F32, "dtype": "I32"}}), DATA)), "dtype 'I32'"),
        (sealed(body_of(told({"a": {**F32, "dtype": ["F32"]}}), DATA)), "dtype"),
        (sealed(body_of(told({"a": {**F32, "shape": [-2]}}), DATA)), "no shape"),
        (sealed(body_of(told({"a": {**F32, "shape": [2.0]}}), DATA)), "no shape"),
        (sealed(body_of(told({"a": {**F32, "shape": [True]}}), DATA)), "no shape"),
        (sealed(body_of(told({"a": {**F32, "shape": "2"}}), DATA)), "no shape"),
        (sealed(body_of(told({"a": {**F32, "shape": [1] * 17}}), DATA)), "no shape"),
        (sealed(body_of(told({"a": {**F32, "shape": [2**40, 2**40]}}), DATA)), "over max_bytes"),
        (sealed(body_of(told({"a": {**F32, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}))), "over max_bytes"),
        (sealed(body_of(told({"a": {**F32, "shape": [3]}}), DATA)), "8 bytes for shape"),
        (sealed(body_of(told({"a": {**F32, "data_offsets": [8, 0]}}), DATA)), "-8 bytes"),
        (sealed(body_of(told({"a": {**F32, "data_offsets": [0]}}), DATA)), "no data_offsets"),
        (sealed(body_of(told({"a": {**F32, "data_offsets": [8, 16]}}), bytes(16))), "begins at 8"),
        (sealed(body_of(told({"a": F32, "b": F32}), DATA)), "begins at 0, not at 8"),
        (sealed(body_of(told({"a": F32}), bytes(9))), "take 8 bytes, and there are 9"),
        (sealed(body_of(told({"a": F32}), bytes(7))), "take 8 bytes, and there are 7"),
        (
            sealed(body_of(told({"a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}), b"\x01\x02")),
            "neither 0",
        ),
        (
            sealed(
                body_of(
                    told(
                        {
                            "a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]},
                            "b": {**F32, "data_offsets": [1, 9]},
                        }
                    ),
                    bytes(9),
                )
            ),
            "no multiple",
        ),
    ],
)
def test_what_is_not_as_it_should_be_is_refused(frame: bytes, says: str) -> None:
    with pytest.raises(ChannelError, match=says):
        frames.decode(frame)


def test_any_flipped_bit_is_noticed() -> None:
    frame = frames.encode(Packet(kind="step", header={"step": 3}, tensors={"cut": torch.randn(5)}))
    for place in range(len(frame)):
        torn = bytearray(frame)
        torn[place] ^= 1 << (place % 8)
        with pytest.raises(ChannelError):
            frames.decode(bytes(torn))


@pytest.mark.parametrize(
    ("packet", "says"),
    [
        (Packet(kind="x", tensors={"a": torch.zeros(1, dtype=torch.int32)}), "'a' is torch.int32"),
        (Packet(kind="x", tensors={"a": torch.zeros(1, dtype=torch.complex64)}), "complex64"),
        (Packet(kind="x", tensors={"a": torch.eye(2).to_sparse()}), "dense"),
        (Packet(kind="x", tensors={"a": torch.zeros(1, device="meta")}), "on the CPU"),
        (Packet(kind="x", tensors={"a": torch.zeros([1] * 17)}), "17 axes"),
        (Packet(kind="x", tensors={"__metadata__": torch.zeros(1)}), "cannot be called"),
        (Packet(kind="x", tensors={"": torch.zeros(1)}), "name must be"),
        (Packet(kind="", header={}), "kind must be"),
        (Packet(kind="x", header={"a": float("inf")}), "'a' is inf"),
        (Packet(kind="x", header={"a": 2**63}), "64 bits"),
        (Packet(kind="x", header={"a": [1]}), "a header takes"),  # type: ignore[dict-item]
        (Packet(kind="x", header={"a": "x" * 2**21}), "max_header_bytes"),
        (Packet(kind="x", tensors={"a": torch.zeros(2**25)}), "max_bytes"),
    ],
)
def test_what_does_not_travel_is_refused_before_it_is_sent(packet: Packet, says: str) -> None:
    with pytest.raises(ChannelError, match=says):
        frames.encode(packet)


def test_limits_hold_on_both_sides() -> None:
    wide = Packet(kind="x", tensors={str(n): torch.zeros(4) for n in range(5)})
    frame = frames.encode(wide)
    for limits, says in [
        (FrameLimits(max_bytes=len(frame) - 1), "max_bytes"),
        (FrameLimits(max_header_bytes=64), "over"),
        (FrameLimits(max_tensors=4), "tensors, over"),
    ]:
        with pytest.raises(ChannelError, match=says):
            frames.decode(frame, limits)
        with pytest.raises(ChannelError, match=says):
            frames.encode(wide, limits)
    assert len(frames.decode(frame, FrameLimits(max_bytes=len(frame), max_tensors=5)).tensors) == 5
    with pytest.raises(ParameterError, match="max_bytes must be"):
        FrameLimits(max_bytes=0)


def test_a_machine_with_the_other_byte_order_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpdl.split.frames.sys.byteorder", "big")
    with pytest.raises(ChannelError, match="little-endian"):
        frames.encode(Packet(kind="x"))
