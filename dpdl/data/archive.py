"""A tar archive read in one pass, in memory: nothing is written to disk, so no path in it can do harm.

An archive from the wild may be damaged or made to exhaust us: a few kilobytes that unpack to terabytes, a
header that asks for all memory, offsets that lead backwards for ever. Every read of unpacked bytes goes
through `_Bounded`, which allows one pass forwards, no read of more than LARGEST_MEMBER, and no more than
LARGEST_ARCHIVE in all; tarfile itself has none of these limits.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from dpdl.data.image_data import Progress
from dpdl.errors import DataError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
LARGEST_MEMBER = 256 * 2**20  # bytes; CIFAR-10's largest is 31 million
LARGEST_ARCHIVE = 16 * 2**30  # bytes, unpacked: more would not fit in memory as float32 images
MEMBERS_PER_PROGRESS = 256


class _Bytes(Protocol):
    """What is asked of a file of unpacked bytes."""

    def tell(self) -> int: ...
    def seek(self, offset: int, /) -> int: ...
    def read(self, size: int, /) -> bytes: ...


_UNPACKERS: tuple[tuple[bytes, Callable[[BinaryIO], _Bytes]], ...] = (
    (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
    (b"BZh", bz2.BZ2File),
)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A folder or regular file of an archive.

    Args:
        path: as the archive has it; never a place on this machine.
        is_folder: whether it is a folder, which has no content.
        read: its bytes; only until the next member is asked for.
    """

    path: PurePosixPath
    is_folder: bool
    read: Callable[[], bytes]


def is_archive(path: Path) -> bool:
    """Whether the name is a tar archive's.

    Example:
        >>> is_archive(Path("digits.tar.xz")), is_archive(Path("digits.zip"))
        (True, False)
    """
    return path.name.lower().endswith(SUFFIXES)


def members(path: Path, progress: Progress) -> Iterator[Member]:
    """Folders and regular files of a tar (plain, gzip, xz or bzip2), in its order.

    Links, devices and sparse files are passed over. Progress counts bytes of the archive as it lies on disk.

    Raises:
        DataError: the archive is missing, damaged, cut short, or larger than the limits above.
    """
    with _blaming(path), path.open("rb") as raw:
        whole = os.fstat(raw.fileno()).st_size
        file = _Bounded(_unpacked(raw), path)
        with tarfile.open(fileobj=file, mode="r:") as archive:  # type: ignore[call-overload]
            count = 0
            while (info := archive.next()) is not None:
                if count % MEMBERS_PER_PROGRESS == 0:
                    progress(path.name, raw.tell(), whole)
                if info.isdir() or (info.isreg() and not info.issparse()):
                    yield Member(
                        path=PurePosixPath(info.name),
                        is_folder=info.isdir(),
                        read=partial(_read, archive, info, path),
                    )
                archive.members.clear()  # tarfile keeps every header that it has seen
                count += 1
        file.check_end()
        progress(path.name, whole, whole)


def _read(archive: tarfile.TarFile, info: tarfile.TarInfo, path: Path) -> bytes:
    with _blaming(path):
        file = archive.extractfile(info)
        assert file is not None, info.name  # only folders and links have no content
        with file:
            return file.read()


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn what a damaged archive makes the standard library raise into one error that names the file."""
    try:
        yield
    except (OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} is not a readable tar archive: {error}. Get or make it anew.") from error


def _unpacked(raw: BinaryIO) -> _Bytes:
    start = raw.read(max(len(magic) for magic, _ in _UNPACKERS))
    raw.seek(0)
    for magic, unpack in _UNPACKERS:  # by content, whatever the name
        if start.startswith(magic):
            return unpack(raw)
    return raw


class _Bounded:
    """The unpacked bytes as tarfile reads them, held to one bounded pass."""

    def __init__(self, file: _Bytes, path: Path) -> None:
        self._file = file
        self._path = path
        self._last = b""

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int) -> int:
        here = self._file.tell()
        if offset < here:
            raise DataError(f"{self._path}: a header leads backwards, from byte {here} to {offset}.")
        self._check(offset - here)
        return self._file.seek(offset)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST_MEMBER:
            raise DataError(f"{self._path}: a header asks for {size} bytes at once, limit {LARGEST_MEMBER}.")
        self._check(size)
        self._last = self._file.read(size)
        return self._last

    def check_end(self) -> None:
        """Raise unless the last block read is the end mark; tarfile takes any broken header for the end."""
        if self._last != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{self._path} is cut short or damaged: no end mark after its last file.")
        while self.read(tarfile.RECORDSIZE):
            pass  # to the very end, so that the checksum of the compressed file is compared

    def _check(self, step: int) -> None:
        if self._file.tell() + step > LARGEST_ARCHIVE:
            raise DataError(f"{self._path} unpacks to more than {LARGEST_ARCHIVE} bytes, the limit.")
