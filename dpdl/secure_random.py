"""Cryptographic random words, addressed by message number instead of by position.

    stream = RandomStream.from_os()
    noise = stream.child("noise")
    words = noise.words(1000, message=step)        # the same step, the same words; nothing to rewind

A stream is a key. Message m of a stream is the AES-256-CTR keystream [1] whose counter block is
m (64 bits) followed by the block's index within the message (64 bits), so no two messages of a
stream share a block, and a training step is found by its number: there is no position to save,
to lose or to rewind. The words of one message are always the same: **whoever draws noise must
use each message once.** A child is a stream of its own, keyed by BLAKE2b of the label under the
parent's key [2].

AES rather than ChaCha20: 1.1 ms against 1.6 ms a million words (OpenSSL 3 through `cryptography`
50, AMD EPYC with AES instructions, one thread; `python -m benchmarks.noise` measures it again).
Both are sound here. AES in counter mode differs from true randomness only in that its blocks
never repeat; over B blocks under one key that is worth an advantage of at most B^2 / 2^129 (the
birthday bound), and a run that draws two words for each of 10^9 parameters over 10^5 steps
has B = 10^14, hence 10^-11.

Public: message numbers, labels, how many words are drawn. Secret: the key, and every word, for as
long as the noise made from it protects anything.

References:
    [1] NIST SP 800-38A, Recommendation for Block Cipher Modes of Operation, 2001, section 6.5.
    [2] Saarinen and Aumasson, The BLAKE2 Cryptographic Hash and MAC, 2015. RFC 7693.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from dpdl.errors import CheckpointError, ParameterError, WrapError

__all__ = ["RandomStream"]

_KEY_BYTES = 32
_WORD_BYTES = 8
_NAME_BYTES = 8  # two of 10^6 keys have the same name with probability 3e-8
_WORDS_PER_BLOCK = 2  # an AES block has 16 bytes
_MESSAGES = 2**64  # the upper half of the counter block
_WORDS_PER_MESSAGE = 2**64 * _WORDS_PER_BLOCK  # the lower half counts blocks
_ZEROS = memoryview(bytes(1 << 16))  # plaintext: encrypting zeros yields the keystream; fits in L2

_STATE_VERSION = 1
_SEED_DOMAIN = b"dpdl.secure_random insecure seed v1:"
_NAME_DOMAIN = b"dpdl name v1"
_CHILD_DOMAIN = b"dpdl child v1"  # BLAKE2b's `person` takes at most 16 bytes


class RandomStream:
    """A keyed, message-addressed stream of cryptographic random words.

    Made by `from_os` (secure), `from_insecure_seed` (reproducible), `child` or `from_state_dict`.
    The key is never shown, pickled, copied, compared or saved.

    Args:
        key: 32 bytes that nobody else knows.
        seed: the seed that the key was made from, if it was: the stream is insecure then.
        labels: the path of children that led here.

    Guarantee:
        Words of different messages, or of streams with different labels, cannot be told from
        independent uniform ones without the key. A stream that is not `secure` promises that
        only to those who do not know, and cannot guess, its seed.

    Raises:
        ParameterError: the key has not 32 bytes.

    Example:
        >>> stream = RandomStream.from_insecure_seed(7).child("noise")
        >>> stream.words(2, message=0)
        array([7411126607618433553, 6382052065188898029], dtype=uint64)
        >>> stream
        RandomStream.from_insecure_seed(7).child('noise')
        >>> RandomStream.from_os().child("noise")
        RandomStream.from_os().child('noise')
    """

    __slots__ = ("_key", "_labels", "_process", "_seed")

    def __init__(self, key: bytes, *, seed: int | None = None, labels: tuple[str, ...] = ()) -> None:
        if len(key) != _KEY_BYTES:
            raise ParameterError(f"a stream's key has {_KEY_BYTES} bytes, got {len(key)}.")
        self._key = key
        self._seed = seed
        self._labels = labels
        self._process = os.getpid()

    @classmethod
    def from_os(cls) -> RandomStream:
        """A stream with a fresh 256-bit key from the operating system."""
        return cls(cls.fresh_key())

    @staticmethod
    def fresh_key() -> bytes:
        """A key from the operating system, for `RandomStream(key)` in several processes of one run."""
        return os.urandom(_KEY_BYTES)

    @classmethod
    def from_insecure_seed(cls, seed: int) -> RandomStream:
        """A reproducible stream: whoever knows the seed can subtract the noise. Research only.

        Raises:
            ParameterError: seed is negative or not an int.
        """
        if not _is_seed(seed):
            raise ParameterError(f"insecure_seed must be an int >= 0, got {seed!r}.")
        return cls(hashlib.sha256(_SEED_DOMAIN + str(seed).encode()).digest(), seed=seed)

    def child(self, label: str) -> RandomStream:
        """An independent stream for one use, such as "noise" or "sampling"; same label, same child."""
        key = hashlib.blake2b(label.encode(), key=self._key, digest_size=_KEY_BYTES, person=_CHILD_DOMAIN).digest()
        child = RandomStream(key, seed=self._seed, labels=(*self._labels, label))
        child._process = self._process  # whose key it comes of
        return child

    @property
    def name(self) -> str:
        """What tells this key from others: BLAKE2b under it [2]. Public; of a secure stream it reveals nothing.

        Of an insecure stream it lets whoever has it try seeds.
        """
        return hashlib.blake2b(b"", key=self._key, digest_size=_NAME_BYTES, person=_NAME_DOMAIN).hexdigest()

    @property
    def secure(self) -> bool:
        """Whether the key came from the operating system."""
        return self._seed is None

    def words(self, count: int, *, message: int, start: int = 0) -> NDArray[np.uint64]:
        """Words start, ..., start + count - 1 of a message.

        A long message can be read in pieces: the pieces, joined, are the whole.

        Args:
            count: how many 64-bit words.
            message: the message's public number, for example the training step, in [0, 2^64).
            start: the first word.

        Returns:
            Words, shape [count], uniform on [0, 2^64), writable.

        Raises:
            ParameterError: message is outside [0, 2^64), count or start is negative, or the words
                lie past the end of the message (2^65 words), where the counter would run into
                the next message.
            WrapError: a secure stream was carried into a forked process.
        """
        if not 0 <= message < _MESSAGES:
            raise ParameterError(f"message must be in [0, 2^64), got {message}.")
        if count < 0 or start < 0:
            raise ParameterError(f"count and start must be >= 0, got count={count}, start={start}.")
        if start + count > _WORDS_PER_MESSAGE:
            raise ParameterError(
                f"a message has 2^65 words, but words {start} to {start + count} were asked for. "
                "Draw the rest from another message or child."
            )
        if self.secure and os.getpid() != self._process:
            raise WrapError(
                "this stream's key was made in another process, which would draw the same words. Make the run "
                "(make_private) in the process that trains."
            )
        block, skipped = divmod(start, _WORDS_PER_BLOCK)
        counter = (message * 2**64 + block).to_bytes(16, "big")
        size = (skipped + count) * _WORD_BYTES
        # update_into asks for up to a block more room than it writes.
        keystream = np.empty(size + _WORDS_PER_BLOCK * _WORD_BYTES, dtype=np.uint8)
        out = keystream.data
        encryptor = Cipher(algorithms.AES(self._key), modes.CTR(counter)).encryptor()
        for begin in range(0, size, len(_ZEROS)):
            encryptor.update_into(_ZEROS[: size - begin], out[begin:])
        words = keystream[:size].view("<u8")[skipped:]
        return words.astype(np.uint64, copy=False)  # copies on a big-endian machine only

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint may hold: the seed of an insecure stream, never the key of a secure one.

        Whoever held a saved key could compute the noise and subtract it from every release.
        Loading the state of a secure stream therefore draws a fresh key (`from_state_dict`).
        """
        return {
            "version": _STATE_VERSION,
            "secure": self.secure,
            "insecure_seed": self._seed,
            "labels": list(self._labels),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RandomStream:
        """The same insecure stream again; for a secure one, a fresh key from the operating system.

        A fresh key is sound: noise and sampling need independent randomness at every step, not
        the same randomness as an uninterrupted run would have had.

        Raises:
            CheckpointError: the state is not one that `state_dict` made.
        """
        if not _is_state(state):
            raise CheckpointError(
                f"not the state of a random stream of version {_STATE_VERSION}: got {state!r}. "
                "Load it with the release that saved it, or start from `RandomStream.from_os()`."
            )
        seed = state["insecure_seed"]
        stream = cls.from_os() if seed is None else cls.from_insecure_seed(seed)
        for label in state["labels"]:
            stream = stream.child(label)
        return stream

    def __repr__(self) -> str:
        origin = "from_os()" if self._seed is None else f"from_insecure_seed({self._seed})"
        return f"RandomStream.{origin}" + "".join(f".child({label!r})" for label in self._labels)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a RandomStream cannot be pickled or copied: its key would go with it, and two holders of "
            "one key draw the same noise. Save `stream.state_dict()`, or hand over `stream.child(label)`."
        )


def _is_seed(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_state(value: object) -> bool:
    """Whether `value` has the form that `RandomStream.state_dict` gives."""
    if not isinstance(value, dict) or set(value) != {"version", "secure", "insecure_seed", "labels"}:
        return False
    seed, labels = value["insecure_seed"], value["labels"]
    return (
        value["version"] == _STATE_VERSION
        and value["secure"] is (seed is None)
        and (seed is None or _is_seed(seed))
        and isinstance(labels, list)
        and all(isinstance(label, str) for label in labels)
    )
