"""MNIST's IDX files: written here byte by byte, as the format's description says."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from dpdl.data import load
from dpdl.errors import DataError

PIXELS = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3) * 4
LABELS = np.array([3, 1, 4, 1, 5], dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write_set(folder: Path, *, dot: bool = False, packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mark = "." if dot else "-"
    for part, count in (("train", 5), ("t10k", 2)):
        for kind, array in ((f"images{mark}idx3", PIXELS[:count]), (f"labels{mark}idx1", LABELS[:count])):
            content = idx_bytes(array)
            name = f"{part}-{kind}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("below", [".", "MNIST/raw", "mnist"])
def test_idx_files_give_the_pixels_and_labels_written(tmp_path: Path, below: str, dot: bool, packed: bool) -> None:
    write_set(tmp_path / below, dot=dot, packed=packed)
    data = load(tmp_path)
    assert data.train_images.shape == (5, 1, 4, 3)
    assert data.train_images.is_contiguous()
    assert torch.equal(data.train_images[:, 0], torch.tensor(PIXELS.astype(np.float32) / 255))
    assert data.train_labels.tolist() == [3, 1, 4, 1, 5]
    assert data.test_labels.tolist() == [3, 1]
    assert data.classes == tuple("0123456789")


def test_naming_one_idx_file_reads_its_set(tmp_path: Path) -> None:
    write_set(tmp_path)
    assert len(load(tmp_path / "train-labels-idx1-ubyte").train_labels) == 5


def test_gzip_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    write_set(tmp_path, packed=True)
    unpacked = tmp_path / "train-images-idx3-ubyte.gz"
    unpacked.write_bytes(idx_bytes(PIXELS))
    assert len(load(tmp_path).train_images) == 5


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    write_set(tmp_path)
    calls: list[tuple[str, int, int | None]] = []
    load(tmp_path, progress=lambda what, done, whole: calls.append((what, done, whole)))
    assert [done for _, done, _ in calls] == [0, 1, 2, 3, 4]
    assert {whole for _, _, whole in calls} == {4}


def test_missing_file_names_all_candidates_and_where_to_get_it(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    message = str(caught.value)
    for name in (
        "t10k-labels-idx1-ubyte",
        "t10k-labels-idx1-ubyte.gz",
        "t10k-labels.idx1-ubyte",
        "exdb/mnist",
    ):
        assert name in message
    assert str(tmp_path) in message


def swap_magic(content: bytes) -> bytes:
    return b"\x00\x00\x0d\x03" + content[4:]  # floats


def cut(content: bytes) -> bytes:
    return content[:-1]


def lengthen(content: bytes) -> bytes:
    return content + b"\x00"


def cut_header(content: bytes) -> bytes:
    return content[:10]


def promise_terabytes(content: bytes) -> bytes:
    return content[:4] + struct.pack(">3I", 2**20, 2**10, 2**10) + content[16:]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (swap_magic, "must begin with the bytes 00 00 08 03.*got 00 00 0d 03"),
        (cut, "must hold 60 bytes.*only 59"),
        (lengthen, "must hold 60 bytes.*got more"),
        (cut_header, "ends inside its header, after 10 bytes"),
        (promise_terabytes, "announces 1099511627776 bytes"),
        (lambda content: b"", "got nothing"),
    ],
)
def test_damaged_idx_file_is_refused_by_name(tmp_path: Path, damage, complaint: str, packed: bool) -> None:
    write_set(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    content = damage(file.read_bytes())
    file.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=f"train-images-idx3-ubyte.*{complaint}"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [slice(None, -4), slice(None, 30)], ids=["checksum", "middle"])
def test_truncated_gzip_is_refused_by_name(tmp_path: Path, keep: slice) -> None:
    write_set(tmp_path, packed=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[keep])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz cannot be read.*Get it anew"):
        load(tmp_path)


def test_flipped_bit_in_gzip_is_refused_by_name(tmp_path: Path) -> None:
    write_set(tmp_path, packed=True)
    file = tmp_path / "train-labels-idx1-ubyte.gz"
    content = bytearray(file.read_bytes())
    content[-8] ^= 1  # the checksum
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz cannot be read: CRC"):
        load(tmp_path)


def test_counts_that_differ_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:4]))
    with pytest.raises(DataError, match="5 images, but train-labels 4 labels"):
        load(tmp_path)


def test_empty_set_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(PIXELS[:0]))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:0]))
    with pytest.raises(DataError, match="t10k-images has no pixels"):
        load(tmp_path)


def test_train_and_test_of_different_sizes_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(PIXELS[:2, :3]))
    with pytest.raises(DataError, match=r"train images are \[1, 4, 3\], but test images are \[1, 3, 3\]"):
        load(tmp_path)


def test_labels_above_nine_get_classes_of_their_own(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS + 20))
    assert len(load(tmp_path).classes) == 26
