"""Packets as bytes: a fixed prefix, then a safetensors file.

    4 bytes    "dpdl"
    4 bytes    version of this format, unsigned, little-endian (as all numbers here)
    8 bytes    length of the body
    32 bytes   the request that this answers: its digest; zeros if it is a request
    32 bytes   SHA-256 of the field before this one and the body
    body       a safetensors file [1]: 8 bytes length of its header, the header, tensors end to end
               __metadata__ = {"dpdl": JSON of {"kind": ..., "header": {...}}}

Nothing in a frame is executed, and nothing is believed: every length is compared with `FrameLimits` and with what is
there before memory is asked for, and whatever is not as above is refused. The same packet always makes the same bytes.
The digest finds accidents and says which reply belongs to which request; it has no key. Against people there is TLS.

References:
    [1] Hugging Face, safetensors, "Format". github.com/huggingface/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpdl.errors import ChannelError, ParameterError
from dpdl.split.channel import Packet, Value

__all__ = ["DIGEST_BYTES", "NO_REQUEST", "FrameLimits", "answers", "decode", "digest", "encode"]

VERSION = 1
DIGEST_BYTES = 32
NO_REQUEST = bytes(DIGEST_BYTES)
_MAGIC = b"dpdl"
_PREFIX = struct.Struct("<4sIQ32s32s")
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8  # bytes: of the widest number; the prefix is a multiple of it
_METADATA = "__metadata__"
_OURS = "dpdl"
_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_WHOLE = 2**63  # whole numbers are below it, as in int64


@dataclass(frozen=True, kw_only=True)
class FrameLimits:
    """How large a frame may be. Both parties may have their own; a frame has to be within both.

    Attributes:
        max_bytes: of a whole frame.
        max_header_bytes: of the names, shapes and plain values in it.
        max_tensors: how many.
        max_axes: of one tensor.
        max_name: characters of a name, and of the kind.

    Raises:
        ParameterError: one of them is not a positive whole number.
    """

    max_bytes: int = 2**26
    max_header_bytes: int = 2**20
    max_tensors: int = 4096
    max_axes: int = 16
    max_name: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value <= 0:
                raise ParameterError(f"{name} must be a whole number > 0, got {value!r}.")


DEFAULT_LIMITS = FrameLimits()


def encode(packet: Packet, limits: FrameLimits = DEFAULT_LIMITS, *, answering: bytes = NO_REQUEST) -> bytes:
    """The packet's frame.

    Args:
        packet: what to send.
        limits: that the frame must be within.
        answering: digest of the request that this is the reply to.

    Raises:
        ChannelError: a tensor or value is not of a kind that travels, or there is too much.
    """
    if sys.byteorder != "little":
        raise ChannelError("Frames are little-endian, and this machine is not. Run this party on another one.")
    _refuse_names([packet.kind], limits, what="kind")
    _refuse_names([*packet.header, *packet.tensors], limits, what="name")
    if _METADATA in packet.tensors:
        raise ChannelError(f"A tensor cannot be called {_METADATA!r}. Give it another name.")
    if len(packet.tensors) > limits.max_tensors:
        raise ChannelError(f"The packet '{packet.kind}' has {len(packet.tensors)} tensors, over {limits.max_tensors}.")
    header = {name: _sendable(name, value) for name, value in packet.header.items()}
    told: dict[str, Any] = {_METADATA: {_OURS: _json({"kind": packet.kind, "header": header})}}
    pieces: list[memoryview] = []
    end = 0
    # The widest first: each then begins at a multiple of its own width, as safetensors' writer has it.
    for name, tensor in sorted(packet.tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        piece = _bytes_of(name, tensor, limits)
        told[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(piece)],
        }
        pieces.append(piece)
        end += len(piece)
    text = _json(told).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > limits.max_header_bytes:
        raise ChannelError(
            f"The names and values of the packet '{packet.kind}' need {len(text)} bytes, over max_header_bytes = "
            f"{limits.max_header_bytes}. Send fewer, or raise that limit at both parties."
        )
    length = _LENGTH.size + len(text) + end
    if _PREFIX.size + length > limits.max_bytes:
        raise ChannelError(
            f"The packet '{packet.kind}' needs {_PREFIX.size + length} bytes, over max_bytes = {limits.max_bytes}. "
            "Send fewer rows at once, or raise that limit at both parties."
        )
    body: list[bytes | memoryview] = [_LENGTH.pack(len(text)), text, *pieces]
    return b"".join([_PREFIX.pack(_MAGIC, VERSION, length, answering, _sealed(answering, body)), *body])


def decode(frame: bytes | memoryview, limits: FrameLimits = DEFAULT_LIMITS) -> Packet:
    """The packet that a frame holds; its tensors are in memory of their own.

    Raises:
        ChannelError: the frame is damaged, of another version, too large, or not a frame.
    """
    view = memoryview(frame)
    _, claimed = _prefix(view, limits)
    body = view[_PREFIX.size :]
    if claimed != _sealed(answers(view), [body]):
        raise ChannelError("A frame was damaged on its way: its digest is not that of its content.")
    told, data = _told(body, limits)
    kind, header = _plain(told.pop(_METADATA, None), limits)
    if len(told) > limits.max_tensors:
        raise ChannelError(f"A frame has {len(told)} tensors, over max_tensors = {limits.max_tensors}.")
    _refuse_names(list(told), limits, what="name")
    spans = {name: _span(name, entry, limits) for name, entry in told.items()}
    end = 0
    for name, (_, _, begin, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise ChannelError(f"The tensor {name!r} of a frame begins at {begin}, not at {end} where the last ended.")
        end = stop
    if end != len(data):
        raise ChannelError(f"The tensors of a frame take {end} bytes, and there are {len(data)}.")
    owned = bytearray(data)  # one copy, of the size that is there
    return Packet(kind=kind, header=header, tensors={name: _tensor(name, owned, *span) for name, span in spans.items()})


def digest(frame: bytes | memoryview) -> bytes:
    """The digest in a frame's prefix, 32 bytes: what to call this very request. `decode` is what checks it.

    Raises:
        ChannelError: it is too short to have one.
    """
    return bytes(_unpacked(memoryview(frame))[4])


def answers(frame: bytes | memoryview) -> bytes:
    """The digest of the request that a frame says it answers; zeros for none.

    Raises:
        ChannelError: it is too short to have one.
    """
    return bytes(_unpacked(memoryview(frame))[3])


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────


def _json(value: Any) -> str:
    """Always the same text for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _sealed(answering: bytes, body: Iterable[bytes | memoryview]) -> bytes:
    sha256 = hashlib.sha256(answering)
    for piece in body:
        sha256.update(piece)
    return sha256.digest()


def _sendable(name: str, value: Value) -> Value:
    if value is None or type(value) is bool or (type(value) is str and _is_text(value)):
        return value
    if type(value) is int and -_WHOLE <= value < _WHOLE:
        return value
    if type(value) is float and math.isfinite(value):
        return value
    raise ChannelError(
        f"The value {name!r} is {_shown(value)}: a header takes bool, int (64 bits), finite float, str and None. Send "
        "anything else as a tensor."
    )


def _bytes_of(name: str, tensor: Tensor, limits: FrameLimits) -> memoryview:
    if tensor.dtype not in _NAMES:
        raise ChannelError(f"The tensor {name!r} is {tensor.dtype}; what travels is {_one_of()}. Convert it.")
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise ChannelError(
            f"The tensor {name!r} is {tensor.layout} on {tensor.device}; what travels is dense, on the CPU. Send "
            f"{name}.to_dense().cpu()."
        )
    if tensor.ndim > limits.max_axes:
        raise ChannelError(f"The tensor {name!r} has {tensor.ndim} axes, over max_axes = {limits.max_axes}.")
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data.cast("B") if flat.numel() else memoryview(b"")


def _one_of() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in _NAMES)


def _refuse_names(names: list[Any], limits: FrameLimits, *, what: str) -> None:
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= limits.max_name or not _is_text(name):
            raise ChannelError(f"A {what} must be a text of 1 to {limits.max_name} characters, got {_shown(name)}.")


def _shown(value: object) -> str:
    """A value that others have sent, for an error: lists in lists are not followed, and long texts are cut."""
    return repr(value)[:40] if isinstance(value, bool | int | float | str | None) else f"a {type(value).__name__}"


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8; half of a surrogate pair cannot, and would fail later, elsewhere."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────


def _unpacked(view: memoryview) -> tuple[Any, ...]:
    if len(view) < _PREFIX.size:
        raise ChannelError(f"A frame has at least {_PREFIX.size} bytes, and {len(view)} came: it was cut off.")
    return _PREFIX.unpack(view[: _PREFIX.size])


def _prefix(view: memoryview, limits: FrameLimits) -> tuple[int, bytes]:
    """Length of the body, and the digest that the frame says it has."""
    if len(view) > limits.max_bytes:
        raise ChannelError(f"A frame has {len(view)} bytes, over max_bytes = {limits.max_bytes}.")
    magic, version, length, _, claimed = _unpacked(view)
    if magic != _MAGIC:
        raise ChannelError(f"What came begins with {magic!r}, not {_MAGIC!r}: it is not from a party of dpdl.split.")
    if version != VERSION:
        raise ChannelError(f"A frame is of version {version}, this party knows {VERSION}. Use the same dpdl at both.")
    if length != len(view) - _PREFIX.size:
        raise ChannelError(f"A frame says that its body has {length} bytes, and {len(view) - _PREFIX.size} came.")
    return length, claimed


def _told(body: memoryview, limits: FrameLimits) -> tuple[dict[str, Any], memoryview]:
    """The safetensors header, and the bytes of the tensors."""
    if len(body) < _LENGTH.size:
        raise ChannelError(f"The body of a frame has {len(body)} bytes: too few for the length of its header.")
    (size,) = _LENGTH.unpack(body[: _LENGTH.size])
    if size > limits.max_header_bytes:
        raise ChannelError(f"The header of a frame has {size} bytes, over {limits.max_header_bytes}.")
    if size > len(body) - _LENGTH.size:
        raise ChannelError(f"The header of a frame should have {size} bytes; {len(body) - _LENGTH.size} came.")
    told = _parsed(bytes(body[_LENGTH.size : _LENGTH.size + size]))
    return told, body[_LENGTH.size + size :]


def _parsed(text: bytes | str) -> dict[str, Any]:
    """A JSON object without repeated names, and without numbers that JSON does not have."""
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, a number of thousands of digits; nested
        raise ChannelError(f"The header of a frame is not JSON ({type(error).__name__}).") from error
    if not isinstance(value, dict):
        raise ChannelError(f"The header of a frame must be an object, got {type(value).__name__}.")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ChannelError("A name stands twice in the header of a frame.")
    return found


def _no_constant(name: str) -> None:
    raise ChannelError(f"The header of a frame has the value {name}, which is not a number in JSON.")


def _plain(metadata: Any, limits: FrameLimits) -> tuple[str, Mapping[str, Value]]:
    """Kind and header of the packet."""
    if not isinstance(metadata, dict) or set(metadata) != {_OURS} or not isinstance(metadata[_OURS], str):
        raise ChannelError(f"A frame has no {_METADATA} with the one entry {_OURS!r}, a text.")
    ours = _parsed(metadata[_OURS])
    if set(ours) != {"kind", "header"} or not isinstance(ours["header"], dict):
        raise ChannelError(f"A frame must tell a kind and a header, and tells {sorted(ours)}.")
    _refuse_names([ours["kind"]], limits, what="kind")
    _refuse_names(list(ours["header"]), limits, what="name")
    return ours["kind"], {name: _sendable(name, value) for name, value in ours["header"].items()}


def _span(name: str, entry: Any, limits: FrameLimits) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """What the header says of one tensor: dtype, shape, and where it begins and ends."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ChannelError(f"The tensor {name!r} of a frame must have dtype, shape and data_offsets, and no more.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ChannelError(f"The tensor {name!r} of a frame is of dtype {_shown(dtype)}; what travels is {_one_of()}.")
    if not _are_lengths(shape) or len(shape) > limits.max_axes:
        raise ChannelError(f"The tensor {name!r} of a frame has no shape of at most {limits.max_axes} whole numbers.")
    if not _are_lengths(offsets) or len(offsets) != 2:
        raise ChannelError(f"The tensor {name!r} of a frame has no data_offsets: two whole numbers.")
    width = _DTYPES[dtype].itemsize
    # An empty tensor takes no bytes, and its other axes could be anything: they are held to the same limit.
    if width * math.prod(max(1, length) for length in shape) > limits.max_bytes:
        raise ChannelError(f"The tensor {name!r} of a frame is over max_bytes = {limits.max_bytes}: shape {shape}.")
    begin, end = offsets
    if end - begin != width * math.prod(shape):
        raise ChannelError(f"The tensor {name!r} of a frame: {end - begin} bytes for shape {shape} of {dtype}.")
    return _DTYPES[dtype], tuple(shape), begin, end


def _are_lengths(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _WHOLE for item in value)


def _tensor(name: str, data: bytearray, dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int) -> Tensor:
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    if begin % dtype.itemsize:
        raise ChannelError(f"The tensor {name!r} of a frame begins at {begin}, which is no multiple of its width.")
    if dtype is torch.bool and data.count(0, begin, end) + data.count(1, begin, end) != end - begin:
        raise ChannelError(f"The tensor {name!r} of a frame is BOOL, and has bytes that are neither 0 nor 1.")
    flat = torch.frombuffer(data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin)
    return flat.reshape(shape)
