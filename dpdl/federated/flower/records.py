"""Tensors and plain values as Flower's records and back, to the last bit.

    FitRequest ─▶ arrays: the global state         FitReply ─▶ update: weights after less weights before
                  config: round, steps, ...                    reply: client, round, weight
                                                               metrics, releases: the inventory

Flower stores an array in numpy's file format, which has no bfloat16 and no float8: those travel as their bits, under
a serialisation type of their own, so that nothing takes them for integers. Whatever comes in is read as if a stranger
had sent it: known types only, no pickle, and exactly as many bytes as the shape says.

References:
    NumPy, NEP 1: A simple file format for numpy arrays.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from dpdl.errors import DataError, ParameterError
from dpdl.federated.inventory import Inventory
from dpdl.federated.messages import FitReply, FitRequest, Scalar

__all__ = [
    "RELEASES",
    "UPDATE",
    "array_from_tensor",
    "arrays_from_tensors",
    "inventory_from_record",
    "record_from_inventory",
    "record_from_reply",
    "record_from_request",
    "reply_from_record",
    "request_from_record",
    "tensor_from_array",
    "tensors_from_arrays",
]

ARRAYS, CONFIG = "arrays", "config"  # what Flower's own strategies call them
UPDATE, REPLY, METRICS, RELEASES = "dpdl.update", "dpdl.reply", "dpdl.metrics", "dpdl.releases"
_RESERVED = "dpdl."  # settings under this prefix are the request's own

_NUMPY = "numpy.ndarray"  # Flower's name for numpy's file format
_BITS = "dpdl.bits"  # the same, of integers as wide as the type that numpy lacks
_WITHOUT_NUMPY = {
    "bfloat16": (torch.bfloat16, torch.int16),
    "float8_e4m3fn": (torch.float8_e4m3fn, torch.int8),
    "float8_e5m2": (torch.float8_e5m2, torch.int8),
}
_NAMES = {kind: name for name, (kind, _) in _WITHOUT_NUMPY.items()}
# numpy's names without the byte order
_KNOWN = frozenset(["b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16"])
_HEADER = re.compile(  # of NEP 1, version 1.0, as numpy writes it for simple types
    rb"\x93NUMPY\x01\x00(?P<length>..)(?P<header>\{'descr': '(?P<kind>[<>|=][biufc]\d{1,2})', "
    rb"'fortran_order': (?P<fortran>True|False), 'shape': \((?P<shape>[\d, ]{0,999})\), \} *\n)",
    re.DOTALL,
)
_INT64 = range(-(2**63), 2**63)  # what a ConfigRecord carries


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────


def array_from_tensor(name: str, tensor: Tensor) -> Array:
    """One tensor, of any shape (() too), as Flower's array.

    Raises:
        DataError: of a type that cannot be carried: quantised, sparse, complex32, ...
    """
    tensor = tensor.detach().cpu()
    kind = _NAMES.get(tensor.dtype)
    if kind is not None:
        tensor = tensor.contiguous().view(_WITHOUT_NUMPY[kind][1])
    try:
        values = tensor.resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:
        raise DataError(
            f"'{name}' is a tensor of type {tensor.dtype} and layout {tensor.layout}, which cannot be sent. Convert it "
            "to a dense one of a type that numpy has, or bfloat16."
        ) from error
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)  # a 0-d array stays one
    return Array(
        dtype=kind or str(values.dtype),
        shape=tuple(values.shape),
        stype=_BITS if kind else _NUMPY,
        data=buffer.getvalue(),
    )


def tensor_from_array(name: str, array: Array) -> Tensor:
    """The tensor that `array_from_tensor` was given.

    Raises:
        DataError: the bytes are not what type and shape say, or of a type that is not known.
    """
    if array.stype not in (_NUMPY, _BITS) or (array.stype == _BITS and array.dtype not in _WITHOUT_NUMPY):
        raise _broken(name, f"it is serialised as {array.stype!r} of {array.dtype!r}, which is not known here")
    values = _read(name, array.data)
    if tuple(values.shape) != tuple(array.shape):
        raise _broken(name, f"its shape is {tuple(values.shape)}, and it says {tuple(array.shape)}")
    if array.stype == _NUMPY:
        if array.dtype not in (str(values.dtype), values.dtype.newbyteorder(">").str):
            raise _broken(name, f"its type is {values.dtype}, and it says {array.dtype}")
        return torch.from_numpy(values)
    kind, bits = _WITHOUT_NUMPY[array.dtype]
    tensor = torch.from_numpy(values)
    if tensor.dtype != bits:
        raise _broken(name, f"its bits are of type {values.dtype}, and it says {array.dtype}")
    return tensor.view(kind)


def _read(name: str, data: bytes) -> np.ndarray[Any, Any]:
    """An array in numpy's file format. Its header is not evaluated, and believed only as far as bytes follow it."""
    found = _HEADER.match(data)
    if found is None or int.from_bytes(found["length"], "little") != len(found["header"]):
        raise _broken(name, "it does not start as numpy's file format does")
    text = found["kind"].decode()
    if text[1:] not in _KNOWN:
        raise _broken(name, f"it is of type {text}, which is not carried")
    kind = np.dtype(text)
    shape = tuple(int(size) for size in found["shape"].decode().split(",") if size.strip())
    fortran = found["fortran"] == b"True"
    count, start = math.prod(shape), found.end()
    if len(data) - start != count * kind.itemsize:
        raise _broken(name, f"{len(data) - start} bytes follow, where shape {shape} of {kind} has more or fewer")
    values = np.frombuffer(data, dtype=kind, count=count, offset=start).reshape(shape, order="F" if fortran else "C")
    return np.array(values, dtype=kind.newbyteorder("="), order="C")  # a copy: bytes cannot be written to


def _broken(name: str, why: str) -> DataError:
    return DataError(f"The array '{name}' of a message cannot be read: {why}. Both sides need the same dpdl and flwr.")


def arrays_from_tensors(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Named tensors as Flower's record, in the same order."""
    return ArrayRecord({name: array_from_tensor(name, tensor) for name, tensor in tensors.items()})


def tensors_from_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """Named tensors of Flower's record, in the same order."""
    return {name: tensor_from_array(name, array) for name, array in record.items()}


# ── the inventory ───────────────────────────────────────────────────────────────────────────────────


def record_from_inventory(inventory: Inventory) -> ConfigRecord:
    """What leaves and what covers it, as parallel lists; an empty inventory is an empty record."""
    if not len(inventory):
        return ConfigRecord()  # Flower cannot measure the size of an empty list
    rows = inventory.to_list()
    columns: dict[str, Any] = {key: [row[key] for row in rows] for key in ("name", "kind", "mechanism")}
    return ConfigRecord({**columns, "shape": [json.dumps(row["shape"]) for row in rows]})


def inventory_from_record(record: ConfigRecord) -> Inventory:
    """What `record_from_inventory` was given.

    Raises:
        DataError: it is not such a record.
    """
    if not len(record):
        return Inventory()
    columns = ("name", "kind", "mechanism", "shape")
    try:
        lists: list[Any] = [record[column] for column in columns]
        rows = list(zip(*lists, strict=True))
        return Inventory.from_list(
            [{**dict(zip(columns, row, strict=True)), "shape": json.loads(row[-1])} for row in rows]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError("The release inventory of a reply cannot be read. Both sides need the same dpdl.") from error


# ── requests and replies ────────────────────────────────────────────────────────────────────────────


def record_from_request(request: FitRequest) -> RecordDict:
    """A request as the content of a message.

    Raises:
        ParameterError: a setting has a reserved name or cannot be carried.
        DataError: a tensor cannot be carried.
    """
    for name in request.config:
        if name.startswith(_RESERVED):
            raise ParameterError(f"config has the setting {name!r}: names that start with 'dpdl.' are taken.")
    own: dict[str, Scalar] = {"dpdl.round": request.round, "dpdl.federation": request.federation}
    if request.steps is not None:
        own["dpdl.steps"] = request.steps
    config = _scalars({**request.config, **own}, what="setting")
    return RecordDict({ARRAYS: arrays_from_tensors(request.state), CONFIG: config})


def request_from_record(content: RecordDict) -> FitRequest:
    """The request that `record_from_request` was given.

    Raises:
        DataError: it is not such a request.
    """
    try:
        arrays, config = content.array_records[ARRAYS], dict(content.config_records[CONFIG])
        number, federation = config.pop("dpdl.round"), config.pop("dpdl.federation")
        steps = config.pop("dpdl.steps", None)
    except KeyError as error:
        raise DataError(
            f"The message is no request of dpdl's: {error} is missing. Drive the clients with DPStrategy, or use "
            "Flower's own ClientApp with Flower's own strategies."
        ) from error
    if not isinstance(number, int) or not isinstance(federation, str) or not isinstance(steps, int | None):
        raise DataError(f"The request's round, federation or steps cannot be read: {number!r}, {federation!r}.")
    return FitRequest(
        round=number,
        state=tensors_from_arrays(arrays),
        steps=steps,
        federation=federation,
        config={name: _scalar(name, value) for name, value in config.items()},
    )


def record_from_reply(reply: FitReply) -> RecordDict:
    """A reply as the content of a message; its `base` stays behind.

    Raises:
        ParameterError: a metric cannot be carried.
        DataError: a tensor cannot be carried.
    """
    return RecordDict(
        {
            UPDATE: arrays_from_tensors(reply.update),
            REPLY: ConfigRecord({"client": reply.client, "round": reply.round, "weight": float(reply.weight)}),
            METRICS: _scalars(reply.metrics, what="metric"),
            RELEASES: record_from_inventory(reply.releases),
        }
    )


def reply_from_record(content: RecordDict, *, base: Mapping[str, Tensor] | None = None) -> FitReply:
    """The reply that `record_from_reply` was given.

    Args:
        content: of the message.
        base: the state that went out with the request, for `FitReply.state`.

    Raises:
        DataError: it is not such a reply.
    """
    try:
        head, metrics = content.config_records[REPLY], content.config_records[METRICS]
        client, number, weight = head["client"], head["round"], head["weight"]
        update, releases = content.array_records[UPDATE], content.config_records[RELEASES]
    except KeyError as error:
        raise DataError(
            f"The message is no reply of dpdl's: {error} is missing. The ClientApp must be one that client_app made."
        ) from error
    if not isinstance(client, str) or not isinstance(number, int) or not isinstance(weight, float):
        raise DataError(f"The reply's client, round or weight cannot be read: {client!r}, {number!r}, {weight!r}.")
    return FitReply(
        client=client,
        round=number,
        update=tensors_from_arrays(update),
        base={} if base is None else base,
        releases=inventory_from_record(releases),
        weight=weight,
        metrics={name: _scalar(name, value) for name, value in metrics.items()},
    )


def _scalars(values: Mapping[str, Scalar], *, what: str) -> ConfigRecord:
    for name, value in values.items():
        if not isinstance(value, bool | int | float | str) or (isinstance(value, int) and value not in _INT64):
            raise ParameterError(
                f"The {what} '{name}' is {value!r}. Only bool, int of 64 bits, float and str can be sent; give "
                "float(...) of it, or leave it out."
            )
    return ConfigRecord(dict(values))


def _scalar(name: str, value: object) -> Scalar:
    if not isinstance(value, bool | int | float | str):
        raise DataError(f"'{name}' of a message is a {type(value).__name__}: only bool, int, float and str are known.")
    return value
