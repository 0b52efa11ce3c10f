"""Records and back: to the last bit, and nothing that is not what it says."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

import numpy as np
import pytest

pytest.importorskip("flwr")

import torch
from flwr.app import Array, ConfigRecord, Error, Message, RecordDict
from torch import Tensor

from dpdl.errors import DataError, ParameterError
from dpdl.federated.flower.records import (
    UPDATE,
    array_from_tensor,
    record_from_reply,
    record_from_request,
    reply_from_record,
    request_from_record,
    tensor_from_array,
)
from dpdl.federated.flower.refusals import error_from_refusal, refusal_from_error
from dpdl.federated.inventory import UNPROTECTED, Inventory, Release
from dpdl.federated.messages import FitReply, FitRequest, Refusal
from tests.federated.flower.grid import travelled

TENSORS = {
    "matrix": torch.randn(3, 4),
    "0-d": torch.tensor(2.5),
    "0-d integer": torch.tensor(7),
    "0-d bfloat16": torch.tensor(1.1, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "bfloat16": torch.randn(2, 3).bfloat16(),
    "float16": torch.randn(5).half(),
    "float64": torch.randn(4, dtype=torch.float64),
    "float8": torch.randn(6).to(torch.float8_e4m3fn),
    "bool": torch.tensor([True, False]),
    "int8": torch.tensor([-128, 127], dtype=torch.int8),
    "uint8": torch.tensor([0, 255], dtype=torch.uint8),
    "int64": torch.tensor([-(2**63), 2**63 - 1]),
    "complex": torch.randn(2, dtype=torch.complex64),
    "not finite": torch.tensor([math.nan, -math.inf, -0.0, 1e-45]),
    "transposed": torch.randn(3, 5).t(),
    "strided bfloat16": torch.randn(4, 6).bfloat16()[::2, 1:4],
    "a parameter": torch.nn.Parameter(torch.randn(2)),
    "conjugate": torch.randn(2, dtype=torch.complex64).conj(),
}


def same_bits(left: Tensor, right: Tensor) -> bool:
    def bits(tensor: Tensor) -> bytes:
        flat = tensor.detach().resolve_conj().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes()

    return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return list(left) == list(right) and all(same_bits(left[name], right[name]) for name in left)


def journey(content: RecordDict) -> RecordDict:
    return travelled(Message(content=content, dst_node_id=2, message_type="train")).content


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back_to_the_last_bit(name: str) -> None:
    back = tensor_from_array(name, array_from_tensor(name, TENSORS[name]))
    assert same_bits(TENSORS[name], back)
    back.zero_()  # it is the receiver's own


def test_a_type_that_numpy_lacks_is_not_taken_for_integers() -> None:
    array = array_from_tensor("w", TENSORS["bfloat16"])
    assert (array.dtype, array.shape) == ("bfloat16", (2, 3))
    with pytest.raises(TypeError):
        array.numpy()  # Flower's own code refuses it, rather than average bits


def test_other_types_are_as_flower_writes_them() -> None:
    for name in ("matrix", "0-d", "int64"):
        ours, flowers = array_from_tensor(name, TENSORS[name]), Array(TENSORS[name].numpy())
        assert (ours.dtype, ours.shape, ours.stype, ours.data) == (
            flowers.dtype,
            flowers.shape,
            flowers.stype,
            flowers.data,
        )


def test_what_cannot_be_sent_is_named() -> None:
    with pytest.raises(DataError, match="'table' is a tensor of type"):
        array_from_tensor("table", torch.eye(3).to_sparse())


REQUESTS = [
    FitRequest(round=3, state=TENSORS, steps=7, federation="north", config={"a": True, "b": 1, "c": 0.1, "d": "ü"}),
    FitRequest(round=1, state={}),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=["full", "bare"])
def test_a_request_comes_back(request_: FitRequest) -> None:
    back = request_from_record(journey(record_from_request(request_)))
    assert same(request_.state, back.state)
    assert (back.round, back.steps, back.federation, back.config) == (
        request_.round,
        request_.steps,
        request_.federation,
        request_.config,
    )
    assert [type(value) for value in back.config.values()] == [type(value) for value in request_.config.values()]


RELEASES = Inventory(
    (
        Release(name="matrix", kind="parameter", mechanism="DP-SGD", shape=(3, 4)),
        Release(name="0-d", kind="parameter", mechanism="DP-SGD"),
        Release(name="loss", kind="metric", mechanism=UNPROTECTED),
    )
)
REPLIES = [
    FitReply(
        client="a",
        round=3,
        update=TENSORS,
        base={"matrix": torch.zeros(3, 4)},
        releases=RELEASES,
        weight=1 / 3,
        metrics={"loss": 0.1, "n": 2**62, "ok": False, "note": ""},
    ),
    FitReply(client="b", round=1, update={}),
]


@pytest.mark.parametrize("reply", REPLIES, ids=["full", "bare"])
def test_a_reply_comes_back_and_its_base_stays_behind(reply: FitReply) -> None:
    content = journey(record_from_reply(reply))
    back = reply_from_record(content)
    assert same(reply.update, back.update)
    assert (back.client, back.round, back.releases, back.weight, back.metrics) == (
        reply.client,
        reply.round,
        reply.releases,
        reply.weight,
        reply.metrics,
    )
    assert [type(value) for value in back.metrics.values()] == [type(value) for value in reply.metrics.values()]
    assert back.base == {}
    assert list(content.array_records) == [UPDATE]


@pytest.mark.parametrize("reason", ["budget", "request", "failed"])
def test_a_refusal_comes_back(reason: str) -> None:
    refusal = Refusal(client="a", round=2, reason=reason, message="why")
    request = Message(content=RecordDict(), dst_node_id=2, message_type="train")
    error = travelled(Message(error_from_refusal(refusal), reply_to=request)).error
    assert refusal_from_error(error, client="a", round=2) == refusal


def test_codes_stay_what_they_are() -> None:
    """A server and its clients may have different versions; docs/flower.md names them."""
    codes = {
        reason: error_from_refusal(Refusal(client="a", round=1, reason=reason)).code
        for reason in ("budget", "request", "failed")
    }
    assert codes == {"budget": 1001, "request": 1002, "failed": 1003}


@pytest.mark.parametrize(
    ("code", "reason"), [(0, "failed"), (2, "failed"), (3, "lost"), (4, "lost"), (5, "lost"), (8, "failed")]
)
def test_flowers_own_errors_are_lost_or_failed(code: int, reason: str) -> None:
    refusal = refusal_from_error(Error(code, "text"), client="a", round=2)
    assert (refusal.reason, refusal.message) == (reason, f"Flower's error {code}: text")


def test_a_reason_of_the_servers_own_is_not_a_clients() -> None:
    with pytest.raises(ParameterError, match="must be one of"):
        error_from_refusal(Refusal(client="a", round=2, reason="lost"))


@pytest.mark.parametrize(
    ("config", "named"),
    [({"dpdl.round": 1}, "dpdl.round"), ({"big": 2**63}, "big"), ({"list": [1]}, "list")],
)
def test_settings_that_cannot_be_sent_are_named(config: dict[str, int], named: str) -> None:
    with pytest.raises(ParameterError, match=named):
        record_from_request(FitRequest(round=1, state={}, config=config))


def test_messages_of_somebody_else_are_refused() -> None:
    with pytest.raises(DataError, match="no request of dpdl's"):
        request_from_record(RecordDict({"arrays": array_record(), "config": ConfigRecord({"server-round": 1})}))
    with pytest.raises(DataError, match="no reply of dpdl's"):
        reply_from_record(RecordDict({"arrays": array_record()}))


def array_record() -> object:
    from flwr.app import ArrayRecord

    return ArrayRecord({"w": Array(np.zeros(2, np.float32))})


def npy(values: np.ndarray, **kwargs: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **kwargs)
    return buffer.getvalue()


GOOD = npy(np.zeros(4, np.float32))
BROKEN = {
    "pickle": Array("object", (1,), "numpy.ndarray", npy(np.array([{}], dtype=object), allow_pickle=True)),
    "cut": Array("float32", (4,), "numpy.ndarray", GOOD[:-1]),
    "longer": Array("float32", (4,), "numpy.ndarray", GOOD + b"\0"),
    "noise": Array("float32", (4,), "numpy.ndarray", b"whatever"),
    "another shape": Array("float32", (2, 2), "numpy.ndarray", GOOD),
    "another type": Array("float64", (4,), "numpy.ndarray", GOOD),
    "unknown bits": Array("int4", (4,), "dpdl.bits", GOOD),
    "wrong bits": Array("bfloat16", (4,), "dpdl.bits", GOOD),
    "unknown form": Array("float32", (4,), "pickle", GOOD),
    "an expression": Array("float32", (4,), "numpy.ndarray", GOOD.replace(b"(4,)", b"4*1,")),
    "no such type": Array("float32", (4,), "numpy.ndarray", GOOD.replace(b"<f4", b"<f3")),
    "text": Array("<U4", (1,), "numpy.ndarray", npy(np.array(["abcd"]))),
}


@pytest.mark.parametrize("how", BROKEN)
def test_bytes_that_are_not_what_they_say_are_refused(how: str) -> None:
    with pytest.raises(DataError, match="The array 'w' of a message cannot be read"):
        tensor_from_array("w", BROKEN[how])


def test_a_shape_without_its_bytes_allocates_nothing() -> None:
    header = GOOD.replace(b"(4,), }      ", b"(4000000000,)")  # the same length
    assert len(header) == len(GOOD)
    with pytest.raises(DataError):
        tensor_from_array("w", Array("float32", (4_000_000_000,), "numpy.ndarray", header))


def test_the_other_byte_order_is_read() -> None:
    values = np.arange(4, dtype=">f4")
    read = tensor_from_array("w", Array("float32", (4,), "numpy.ndarray", npy(values)))
    assert read.tolist() == [0.0, 1.0, 2.0, 3.0]
