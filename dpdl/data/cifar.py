"""CIFAR-10 from its python batches: a folder of five training pickles and one for testing, or the tar of it.

A pickle is a program, and `pickle.load` runs it. Here a pickle may name six things of numpy and one of the
standard library, and each name leads to a stand-in of this module that can hold unsigned bytes and nothing
else: neither numpy's code nor anybody else's is reached from the file.

References:
    A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpdl.data.archive import members
from dpdl.data.image_data import ImageData, Progress, no_progress, unit_interval
from dpdl.errors import DataError

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"
BATCHES = (*TRAIN_BATCHES, TEST_BATCH)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE = (3, 32, 32)  # [C, H, W], as a row of a batch holds it
LARGEST_BATCH = 64 * 2**20  # bytes; the real ones have 31 million
WHERE_TO_GET_IT = (
    f"The data set is CIFAR-10, python version, {ARCHIVE}, home page www.cs.toronto.edu/~kriz/cifar.html; "
    f"it holds {FOLDER}/ with {TRAIN_BATCHES[0]} to {TRAIN_BATCHES[-1]} and {TEST_BATCH}."
)


def cifar_folder(path: Path) -> Path | None:
    """The folder, path or in path, that holds at least one python batch, or None."""
    for folder in (path, path / FOLDER):
        if any((folder / name).is_file() for name in BATCHES):
            return folder
    return None


def load_cifar10(path: Path, progress: Progress = no_progress) -> ImageData:
    """Read CIFAR-10.

    Args:
        path: the folder cifar-10-batches-py, or the one it lies in, or a tar that holds it.
        progress: told of each batch, or of the bytes of the tar.

    Returns:
        Images of shape [50000, 3, 32, 32] and [10000, 3, 32, 32], where the files are the real ones.

    Raises:
        DataError: a batch is missing, damaged, not a batch, or a pickle that does more than hold data.
    """
    source = cifar_folder(path) or path
    found = dict(_from_folder(source, progress) if source.is_dir() else _from_archive(source, progress))
    missing = [name for name in BATCHES if name not in found]
    if missing:
        raise DataError(f"{source} has no {', '.join(missing)}. {WHERE_TO_GET_IT}")
    train_images, train_labels = zip(*(found[name] for name in TRAIN_BATCHES), strict=True)
    test_images, test_labels = found[TEST_BATCH]
    return ImageData(
        train_images=unit_interval(np.concatenate(train_images)),
        train_labels=torch.cat(train_labels),
        test_images=unit_interval(test_images),
        test_labels=test_labels,
        classes=CLASSES,
        name="CIFAR-10",
        source=str(source),
    )


Batch = tuple[npt.NDArray[np.uint8], Tensor]  # images [N, C, H, W], labels [N]


def _from_folder(folder: Path, progress: Progress) -> Iterator[tuple[str, Batch]]:
    present = [name for name in BATCHES if (folder / name).is_file()]
    for done, name in enumerate(present):
        progress(str(folder), done, len(present))
        try:
            with (folder / name).open("rb") as file:
                content = file.read(LARGEST_BATCH + 1)
        except OSError as error:
            raise DataError(f"{folder / name} cannot be read: {error}. {WHERE_TO_GET_IT}") from error
        yield name, parse_batch(content, where=str(folder / name))
    progress(str(folder), len(present), len(present))


def _from_archive(path: Path, progress: Progress) -> Iterator[tuple[str, Batch]]:
    for member in members(path, progress):
        if member.path.parent.name == FOLDER and member.path.name in BATCHES and not member.is_folder:
            yield member.path.name, parse_batch(member.read(), where=f"{member.path} in {path}")


def parse_batch(content: bytes, *, where: str) -> Batch:
    """Images and labels of one pickled batch.

    Args:
        content: the pickle, protocol 0 to 5, as Python 2 or 3 wrote it.
        where: what to call it in errors.

    Returns:
        Images, shape [N, 3, 32, 32], uint8, and labels, shape [N], int64, 0 to 9.

    Raises:
        DataError: it is not a batch, or asks for anything beyond arrays of bytes and plain containers.
    """
    if len(content) > LARGEST_BATCH:
        raise _not_a_batch(where, f"it is larger than {LARGEST_BATCH} bytes")
    try:
        batch = _BytesOnlyUnpickler(io.BytesIO(content), encoding="bytes").load()
    except _UNPICKLING_ERRORS as error:
        raise _not_a_batch(where, str(error)) from error
    if not isinstance(batch, Mapping):
        raise _not_a_batch(where, f"it must hold a dict, got {_kind(batch)}")
    pixels = batch.get(b"data", batch.get("data"))  # Python 2 wrote bytes for keys
    labels = batch.get(b"labels", batch.get("labels"))
    row = math.prod(IMAGE)
    if not isinstance(pixels, _Array) or len(pixels.shape) != 2 or pixels.shape[1] != row:
        raise _not_a_batch(where, f"'data' must be an array of bytes [N, {row}], got {_kind(pixels)}")
    if not isinstance(labels, list) or len(labels) != pixels.shape[0]:
        found = f"{len(labels)} of them" if isinstance(labels, list) else _kind(labels)
        raise _not_a_batch(where, f"'labels' must be a list of {pixels.shape[0]}, got {found}")
    for label in labels:
        if type(label) is not int or not 0 <= label < len(CLASSES):
            raise _not_a_batch(where, f"a label must be 0..9, got {_kind(label)}")
    return pixels.to_numpy().reshape(-1, *IMAGE), torch.tensor(labels, dtype=torch.int64)


def _not_a_batch(where: str, why: str) -> DataError:
    return DataError(f"{where} is not a CIFAR-10 python batch: {why}. {WHERE_TO_GET_IT}")


def _kind(value: object) -> str:
    """What a value from a pickle is, for an error. Its repr could be endless: [[a, a], [a, a], ...]."""
    if isinstance(value, _Array):
        return f"one of shape {list(value.shape)}"
    return repr(value) if isinstance(value, int) else f"a {type(value).__name__}"


class _Dtype:
    """Stands in for numpy.dtype: knows unsigned bytes, and refuses every other type."""

    def __init__(self, code: object, *align_and_copy: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"arrays must be of unsigned bytes ('u1'), got {_kind(code)}")

    def __setstate__(self, state: object) -> None:
        """Byte order and the like: one byte has none."""


class _Array:
    """Stands in for numpy.ndarray: a shape, and the bytes."""

    shape: tuple[int, ...] = ()  # of the class: a pickle can make an instance without its __init__
    _content = b""

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple(shape), _Dtype(), False, bytes(content)):  # version, ..., column-major, ...
                self._fill(content, shape)
            case _:
                raise pickle.UnpicklingError("an array is not a row-major one of bytes")

    def _fill(self, content: bytes, shape: tuple[object, ...]) -> None:
        sizes = tuple(size for size in shape if isinstance(size, int) and size >= 0)
        if len(sizes) != len(shape) or math.prod(sizes) != len(content):
            raise pickle.UnpicklingError(f"an array's {len(content)} bytes do not fill its shape")
        self.shape, self._content = sizes, content

    def to_numpy(self) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self._content, dtype=np.uint8).reshape(self.shape)


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    """Stands in for numpy's: an empty array, which the pickle fills by its state."""
    return _Array()


def _frombuffer(content: object, dtype: object, shape: object, order: object) -> _Array:
    """Stands in for numpy's, which pickle protocol 5 uses."""
    array = _Array()
    if isinstance(content, bytearray):
        content = bytes(content)
    array.__setstate__((1, shape, dtype, order != "C", content))
    return array


def _encode(text: object, encoding: object) -> bytes:
    """Stands in for codecs.encode, by which Python 3 writes bytes in protocols below 3."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes must be written as text in latin1")
    return text.encode("latin1")


_STAND_INS: Mapping[tuple[str, str], Callable[..., object]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
}

# What a damaged pickle, or one that calls the stand-ins in the wrong way, makes the unpickler raise.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


class _BytesOnlyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., object]:
        stand_in = _STAND_INS.get((module, name))
        if stand_in is None:
            raise pickle.UnpicklingError(f"it asks for {module:.80}.{name:.80}, which no batch needs; not run")
        return stand_in
