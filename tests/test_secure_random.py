"""The keystream is AES-256-CTR, no two addresses share any of it, and the key does not leak."""

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from dpdl.errors import CheckpointError, ParameterError
from dpdl.secure_random import RandomStream

# NIST SP 800-38A, F.5.5 CTR-AES256.Encrypt: the key, the initial counter block, and plaintext xor
# ciphertext of the four blocks, which is the keystream.
NIST_KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
NIST_COUNTER = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
NIST_KEYSTREAM = bytes.fromhex(
    "0bdf7df1591716335e9a8b15c860c502"
    "5a6e699d536119065433863c8f657b94"
    "1bc12c9c01610d5d0d8bd6a3378eca62"
    "2956e1c8693536b1bee99c73a31576b6"
)


def ecb(key: bytes, block: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(block)


def test_words_match_the_nist_vector() -> None:
    message = int.from_bytes(NIST_COUNTER[:8], "big")
    start = 2 * int.from_bytes(NIST_COUNTER[8:], "big")
    words = RandomStream(NIST_KEY).words(8, message=message, start=start)
    assert words.astype("<u8").tobytes() == NIST_KEYSTREAM


def test_words_are_the_block_cipher_of_message_and_block_number() -> None:
    key = bytes(range(32))
    message = 2**40 + 3
    blocks = 2**16 // 16 + 5  # past one run of the internal buffer
    expected = b"".join(ecb(key, message.to_bytes(8, "big") + i.to_bytes(8, "big")) for i in range(blocks))
    words = RandomStream(key).words(2 * blocks, message=message)
    assert words.dtype == np.uint64
    assert words.flags.writeable
    assert words.astype("<u8").tobytes() == expected


@given(start=st.integers(0, 300), count=st.integers(0, 300))
def test_pieces_of_a_message_join_to_the_whole(start: int, count: int) -> None:
    stream = RandomStream.from_insecure_seed(1)
    whole = stream.words(600, message=5)
    np.testing.assert_array_equal(stream.words(count, message=5, start=start), whole[start : start + count])


def test_messages_and_children_share_no_block() -> None:
    root = RandomStream.from_insecure_seed(3)
    streams = [
        root,
        root.child("noise"),
        root.child("sampling"),
        root.child(""),
        root.child("noise").child("sampling"),
        root.child("noisesampling"),
        RandomStream.from_insecure_seed(4),
        RandomStream.from_insecure_seed(34),
    ]
    messages = [0, 1, 2, 2**32, 2**63, 2**64 - 1]
    words = [stream.words(1000, message=m) for stream in streams for m in messages]
    flat = np.concatenate(words)
    assert len(np.unique(flat)) == len(flat)  # a clash by chance: 48,000^2 / 2^65, 1 in 10^10


def test_the_same_label_gives_the_same_child_and_two_streams_from_the_os_differ() -> None:
    root = RandomStream.from_os()
    np.testing.assert_array_equal(root.child("a").words(4, message=0), root.child("a").words(4, message=0))
    assert (root.words(4, message=0) != RandomStream.from_os().words(4, message=0)).all()


def biased_bits(words: np.ndarray) -> int:
    """How many of the 64 bit positions have a mean further than 4.5 standard errors from 1/2."""
    bits = np.unpackbits(words.view(np.uint8)).reshape(len(words), 64)
    z = (bits.mean(0) - 0.5) * 2 * np.sqrt(len(words))
    return int((abs(z) > 4.5).sum())


def test_every_bit_of_the_words_is_fair() -> None:
    words = RandomStream.from_insecure_seed(0).words(100_000, message=0)
    assert biased_bits(words) == 0
    assert biased_bits(words | RandomStream.from_insecure_seed(1).words(100_000, message=0)) == 64
    assert biased_bits(words & np.uint64(2**63 - 1)) == 1


@pytest.mark.parametrize(
    ("count", "message", "start"),
    [(1, -1, 0), (1, 2**64, 0), (-1, 0, 0), (1, 0, -1), (2**65 + 1, 0, 0), (1, 0, 2**65), (2, 0, 2**65 - 1)],
)
def test_words_outside_the_counter_are_refused(count: int, message: int, start: int) -> None:
    with pytest.raises(ParameterError):
        RandomStream.from_insecure_seed(0).words(count, message=message, start=start)


def test_the_last_words_of_a_message_are_not_the_first_of_the_next() -> None:
    stream = RandomStream.from_insecure_seed(0)
    last = stream.words(4, message=7, start=2**65 - 4)
    assert not np.isin(last, stream.words(4, message=8)).any()


@pytest.mark.parametrize("seed", [-1, 1.0, True, None, "1"])
def test_seeds_that_are_not_natural_numbers_are_refused(seed: object) -> None:
    with pytest.raises(ParameterError, match="insecure_seed"):
        RandomStream.from_insecure_seed(seed)  # type: ignore[arg-type]


Saved = Callable[[dict[str, Any]], dict[str, Any]]


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads(json.dumps(state))
    return saved


def through_torch(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    saved: dict[str, Any] = torch.load(file, weights_only=True)
    return saved


@pytest.mark.parametrize("saved", [through_json, through_torch])
@pytest.mark.parametrize("seed", [0, 7, 2**80])
def test_an_insecure_stream_goes_on_after_a_reload(saved: Saved, seed: int) -> None:
    stream = RandomStream.from_insecure_seed(seed).child("noise").child("rank 3")
    again = RandomStream.from_state_dict(saved(stream.state_dict()))
    assert not again.secure
    assert repr(again) == repr(stream)
    np.testing.assert_array_equal(again.words(9, message=4), stream.words(9, message=4))


@pytest.mark.parametrize("saved", [through_json, through_torch])
def test_a_secure_stream_never_repeats_after_a_reload(saved: Saved) -> None:
    stream = RandomStream.from_os().child("noise")
    state = saved(stream.state_dict())
    first, second = RandomStream.from_state_dict(state), RandomStream.from_state_dict(state)
    assert first.secure
    assert repr(first) == repr(stream)
    words = np.concatenate([s.words(100, message=4) for s in (stream, first, second)])
    assert len(np.unique(words)) == 300


def test_the_state_of_a_secure_stream_holds_no_key() -> None:
    assert RandomStream.from_os().child("noise").state_dict() == {
        "version": 1,
        "secure": True,
        "insecure_seed": None,
        "labels": ["noise"],
    }


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"secure": True},
        {"extra": 1},
        {"insecure_seed": None},
        {"insecure_seed": -7},
        {"labels": "noise"},
        {"labels": [1]},
    ],
)
def test_a_state_that_is_not_a_streams_is_refused(change: dict[str, Any]) -> None:
    state = RandomStream.from_insecure_seed(7).child("noise").state_dict() | change
    with pytest.raises(CheckpointError):
        RandomStream.from_state_dict(state)


def test_the_key_is_neither_printed_pickled_nor_copied() -> None:
    key = bytes(range(100, 132))
    stream = RandomStream(key)
    assert repr(stream) == "RandomStream.from_os()"
    assert not hasattr(stream, "__dict__")
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            leak(stream)
