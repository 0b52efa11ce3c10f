"""MNIST's own file format, IDX: a big-endian header, then one byte a pixel or label.

    bytes 0..3   magic: two zero bytes, the type (8 = unsigned byte), the number of axes
    then         the length of each axis, four bytes each
    then         the payload, the last axis fastest

Fashion-MNIST, KMNIST and others use the same four file names, so the names say nothing of which it is.

References:
    Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits, "File formats".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from dpdl.data.image_data import ImageData, Progress, no_progress, unit_interval
from dpdl.errors import DataError

FOLDERS = (".", "MNIST/raw", "mnist")  # torchvision's and the common one, besides the folder itself
STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")
AXES = {"images": 3, "labels": 1}
UNSIGNED_BYTE = 8  # the only type that MNIST's files use
LARGEST_PAYLOAD = 2**30  # bytes: what a false header can make us hold. EMNIST, the largest set, has 0.55e9.
GZIP_MAGIC = b"\x1f\x8b"
WHERE_TO_GET_IT = (
    "The data set is MNIST, home page yann.lecun.com/exdb/mnist; it is these four files, gzipped or not: "
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte."
)


def idx_folder(path: Path) -> Path | None:
    """The folder in or under path that holds at least one IDX file by its standard name, or None."""
    for folder in FOLDERS:
        if any((path / folder / name).is_file() for stem in STEMS for name in file_names(stem)):
            return path / folder
    return None


def file_names(stem: str) -> tuple[str, ...]:
    """The names that a file of MNIST goes by.

    Example:
        >>> file_names("t10k-labels")[:2]
        ('t10k-labels-idx1-ubyte', 't10k-labels-idx1-ubyte.gz')
    """
    axes = AXES[stem.split("-")[1]]
    names = (f"{stem}-idx{axes}-ubyte", f"{stem}.idx{axes}-ubyte")
    return tuple(name + suffix for name in names for suffix in ("", ".gz"))


def load_idx(path: Path, progress: Progress = no_progress) -> ImageData:
    """Read MNIST's four files.

    Args:
        path: the folder that holds them, or one that has them in MNIST/raw/ or mnist/.
        progress: told of each file.

    Returns:
        Images of shape [N, 1, H, W]. Classes are named by their labels, "0" to at least "9".

    Raises:
        DataError: a file is missing, damaged, or does not match its partner.
    """
    folder = idx_folder(path) or path
    arrays = []
    for done, stem in enumerate(STEMS):
        progress(str(folder), done, len(STEMS))
        arrays.append(_read(_find(folder, stem), axes=AXES[stem.split("-")[1]]))
    train_images, train_labels, test_images, test_labels = arrays

    for stem, images, labels in (("train", train_images, train_labels), ("t10k", test_images, test_labels)):
        if len(images) != len(labels):
            raise DataError(
                f"{folder}: {stem}-images holds {len(images)} images, but {stem}-labels "
                f"{len(labels)} labels: they are of different sets. {WHERE_TO_GET_IT}"
            )
        if images.size == 0:
            raise DataError(f"{folder}: {stem}-images has no pixels, shape {images.shape}. {WHERE_TO_GET_IT}")
    highest = max(9, int(train_labels.max()), int(test_labels.max()))
    data = ImageData(
        train_images=unit_interval(train_images[:, None]),
        train_labels=torch.from_numpy(train_labels.astype(np.int64)),
        test_images=unit_interval(test_images[:, None]),
        test_labels=torch.from_numpy(test_labels.astype(np.int64)),
        classes=tuple(str(label) for label in range(highest + 1)),
        name="MNIST-format images",
        source=str(folder),
    )
    progress(str(folder), len(STEMS), len(STEMS))
    return data


def _find(folder: Path, stem: str) -> Path:
    candidates = [folder / name for name in file_names(stem)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = ", ".join(candidate.name for candidate in candidates)
    raise DataError(f"{folder} has none of {names}. {WHERE_TO_GET_IT}")


def _read(path: Path, *, axes: int) -> npt.NDArray[np.uint8]:
    try:
        with path.open("rb") as raw:
            is_gzipped = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC  # by content: browsers unpack and keep ".gz"
            raw.seek(0)
            if not is_gzipped:
                return _parse(raw, path, axes)
            with gzip.GzipFile(fileobj=raw) as unpacked:
                return _parse(unpacked, path, axes)
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        raise DataError(f"{path} cannot be read: {error}. Get it anew. {WHERE_TO_GET_IT}") from error


def _parse(file: BinaryIO | gzip.GzipFile, path: Path, axes: int) -> npt.NDArray[np.uint8]:
    expected_magic = bytes((0, 0, UNSIGNED_BYTE, axes))
    magic = file.read(4)
    if magic != expected_magic:
        raise DataError(
            f"{path} must begin with the bytes {expected_magic.hex(' ')} (IDX, unsigned bytes, {axes} axes), "
            f"got {magic.hex(' ') or 'nothing'}: it is not the file its name says. {WHERE_TO_GET_IT}"
        )
    lengths = file.read(4 * axes)
    if len(lengths) != 4 * axes:
        raise DataError(f"{path} ends inside its header, after {4 + len(lengths)} bytes. {WHERE_TO_GET_IT}")
    shape = struct.unpack(f">{axes}I", lengths)
    size = math.prod(shape)
    if size > LARGEST_PAYLOAD:
        raise DataError(f"{path} announces {size} bytes, shape {shape}; the limit is {LARGEST_PAYLOAD}.")
    payload = file.read(size + 1)  # one more: reads to the end, so that gzip checks its sum
    if len(payload) != size:
        found = f"only {len(payload)}" if len(payload) < size else "more"
        raise DataError(f"{path} must hold {size} bytes for shape {shape}, got {found}. {WHERE_TO_GET_IT}")
    return np.frombuffer(payload, dtype=np.uint8).reshape(shape)
