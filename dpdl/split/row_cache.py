"""Released rows by name: each is noised once, and from then on only looked up.

    cache = RowCache("alice.rows")
    cut = CachedRelease(release, cache=cache, encoder=encoder, account=account, stream=stream)
    sent = cut.release(x, ids)          # any number of epochs; one release of each row

The rows in it are public once they have left; the rest of the file is not (`dpdl.split.draw_once`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dpdl.errors import CheckpointError, ModelError
from dpdl.split.cut_release import CutRelease
from dpdl.split.draw_once import DrawOnce, Setting

__all__ = ["RowCache", "encoder_digest"]

_DIGEST_BYTES = 16


def encoder_digest(encoder: nn.Module) -> str:
    """What tells a frozen encoder from another: its structure as printed, its weights and buffers to the last bit."""
    digest = hashlib.blake2b(repr(encoder).encode(), digest_size=_DIGEST_BYTES, person=b"dpdl encoder")
    for name, tensor in sorted(encoder.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(_bytes_of(tensor))
        else:
            digest.update(f"\0{name}\0{tensor!r}\0".encode())
    return digest.hexdigest()


class RowCache:
    """Row name to released row, in memory or in a file.

    Args:
        path: the file, made if there is none; None to keep it in memory.

    It belongs to one release and one encoder from its first use on: with others it raises (`belong_to`), since the same
    row would be noised anew.

    Guarantee:
        A row that is in the file never gets a second draw, whichever process asks, and whenever one is killed. In
        memory that holds for the process alone, and a lost file is another release of every row.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._path = path
        self._store: DrawOnce | None = None
        self._for: tuple[CutRelease, str] | None = None

    def belong_to(self, release: CutRelease, encoder: str) -> str:
        """Open it for rows of this release and encoder.

        Args:
            release: how rows are clipped and noised.
            encoder: `encoder_digest` of what computes them.

        Returns:
            The store's name, which the ledger knows it by.

        Raises:
            CheckpointError: it holds rows of another release or encoder, or the file is damaged.
        """
        if self._store is None:
            settings: dict[str, Setting] = {
                "max_norm": release.max_norm,
                "noise_multiplier": release.noise_multiplier,
                "encoder": encoder,
            }
            self._store = DrawOnce(self._path, kind="released rows", settings=settings)
            self._for = (release, encoder)
        elif self._for != (release, encoder):
            raise CheckpointError(
                f"{self._store.name} belongs to another {'encoder' if self._for[1] != encoder else 'release'}"  # type: ignore[index]
                ": rows from this one would be a second release. Give it a cache of its own; the ledger counts both."
            )
        return self._store.id

    def get(
        self, ids: Sequence[object] | Tensor, inputs: Tensor, *, noised: Callable[[list[int], int], Tensor]
    ) -> Tensor:
        """The released row of each name, made now where there is none.

        Args:
            ids: the rows' n names.
            inputs: what the rows are computed from, shape [n, ...]: it must be what it was when they were released.
            noised: given places in `ids` and a number of its own, the noised rows [k, ...] of those places.

        Returns:
            Rows, shape [n, ...], float32, or float64 where they were noised as such.

        Raises:
            CheckpointError: a row is not what it was; the file is damaged, or cannot be written.
        """
        store = self._opened()
        contents = [_described(row) + _bytes_of(row) for row in inputs.detach()]
        values = store.get(ids, contents, draw=lambda places, number: _packed(noised(places, number), len(places)))
        return torch.stack([_unpacked(value) for value in values]) if values else torch.empty(0)

    @property
    def count(self) -> int:
        """How many rows it holds.

        Raises:
            CheckpointError: it belongs to no release yet.
        """
        return self._opened().count

    def __contains__(self, row: object) -> bool:
        """Whether a row has been released."""
        return row in self._opened()

    def close(self) -> None:
        """Let go of the file."""
        if self._store is not None:
            self._store.close()

    def _opened(self) -> DrawOnce:
        if self._store is None:
            raise CheckpointError("A row cache is opened by the release that it belongs to: cache.belong_to(...).")
        return self._store


def _packed(rows: Tensor, count: int) -> list[bytes]:
    """Each row as bytes: its shape, then its numbers."""
    if len(rows) != count:
        raise ModelError(f"The encoder gave {len(rows)} rows for {count} examples; one each is needed, on axis 0.")
    wide = rows if rows.dtype is torch.float64 else rows.to(torch.float32)
    return [_described(row) + _bytes_of(row) for row in wide]


def _described(row: Tensor) -> bytes:
    return f"{str(row.dtype).removeprefix('torch.')} {' '.join(map(str, row.shape))}\n".encode()


def _unpacked(value: bytes) -> Tensor:
    head, numbers = value.split(b"\n", 1)
    name, *shape = head.decode().split()
    return torch.from_numpy(np.frombuffer(numbers, dtype=np.dtype(name).newbyteorder("<")).astype(name)).reshape(
        [int(axis) for axis in shape]
    )


def _bytes_of(tensor: Tensor) -> bytes:
    """A tensor's numbers as they lie in memory, little-endian, whatever the dtype."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
