"""CIFAR-10's python batches: one as Python 2 wrote the real ones, and pickles that must not run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dpdl.data import load
from dpdl.data.cifar import BATCHES, CLASSES, parse_batch
from dpdl.errors import DataError

ROWS = np.random.default_rng(0).integers(0, 256, size=(3, 3072), dtype=np.uint8)
LABELS = [6, 9, 0]


def batch(rows: np.ndarray = ROWS, labels: object = LABELS, protocol: int = 2) -> bytes:
    return pickle.dumps({b"data": rows, b"labels": labels, b"filenames": [b"a.png"] * 3}, protocol)


def python2_batch() -> bytes:
    """The opcodes of the real files: byte strings, numpy before 2, the array's bytes as one long string."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    labels = b"](" + b"".join(b"K" + bytes([label]) for label in LABELS) + b"e"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR"
    dtype += b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    content = b"T" + struct.pack("<i", ROWS.size) + ROWS.tobytes()
    array += b"(K\x01K\x03M\x00\x0c\x86" + dtype + b"\x89" + content + b"tb"
    entries = text(b"batch_label") + text(b"training batch 1 of 5")
    entries += text(b"labels") + labels + text(b"data") + array
    return b"\x80\x02}(" + entries + b"u."


def write_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in BATCHES:
        (folder / name).write_bytes(batch())
    return folder


def assert_is_the_set(data) -> None:
    assert data.train_images.shape == (15, 3, 32, 32)
    assert torch.equal(data.train_images[:3].flatten(1), torch.tensor(ROWS.astype(np.float32) / 255))
    assert data.train_labels.tolist() == LABELS * 5
    assert data.test_labels.tolist() == LABELS
    assert data.classes == CLASSES
    assert data.name == "CIFAR-10"


def test_python2_batch_of_the_test_is_what_numpy_reads() -> None:
    rows = pickle.loads(python2_batch(), encoding="bytes")[b"data"]
    assert np.array_equal(rows, ROWS)


def test_python2_batch_gives_its_pixels_and_labels() -> None:
    images, labels = parse_batch(python2_batch(), where="batch")
    assert np.array_equal(images.reshape(3, -1), ROWS)
    assert labels.tolist() == LABELS


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_batch_of_any_protocol_gives_its_pixels(protocol: int) -> None:
    images, labels = parse_batch(batch(protocol=protocol), where="batch")
    assert np.array_equal(images.reshape(3, -1), ROWS)
    assert labels.tolist() == LABELS


@pytest.mark.parametrize("below", [".", "cifar-10-batches-py"])
def test_folder_of_batches(tmp_path: Path, below: str) -> None:
    write_folder(tmp_path / "set" / below)
    assert_is_the_set(load(tmp_path / "set"))


@pytest.mark.parametrize("place", ["file", "folder"])
@pytest.mark.parametrize("suffix", ["gz", "xz", "bz2", ""])
def test_tar_of_batches(tmp_path: Path, suffix: str, place: str) -> None:
    folder = write_folder(tmp_path / "cifar-10-batches-py")
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / ("cifar-10-python.tar" + (f".{suffix}" if suffix else ""))
    with tarfile.open(path, f"w:{suffix}") as archive:
        archive.add(folder, arcname=folder.name)
    assert_is_the_set(load(path if place == "file" else path.parent))


def test_missing_batches_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_3").unlink()
    (folder / "test_batch").unlink()
    with pytest.raises(DataError, match=r"no data_batch_3, test_batch\. .*cifar-10-python\.tar\.gz.*kriz/cifar"):
        load(tmp_path)


class _Runs:
    """A pickle that creates a file when it is loaded the usual way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "cifar-10-batches-py")
    harm = tmp_path / "harm"
    content = pickle.dumps({b"data": _Runs(harm), b"labels": []})
    pickle.loads(content)
    assert harm.is_dir(), "the pickle must be one that does harm"
    harm.rmdir()
    (folder / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match=r"data_batch_2.*it asks for posix\.mkdir, which no batch needs; not run"):
        load(tmp_path)
    assert not harm.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",  # a path through an allowed name
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy\nndarray\n(I9\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"Pid\n.",  # persistent id
        b"\x82\x01.",  # extension registry
        b"]" * 10 + b".",
        b"",
        b"not a pickle at all",
        b"\x80\x02" + b"(" * 3,
    ],
)
def test_pickle_that_is_no_batch_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="this one is not a CIFAR-10 python batch"):
        parse_batch(content, where="this one")


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (batch(labels=[1, 2]), "'labels' must be a list of 3, got 2 of them"),
        (batch(labels=[1, 2, 10]), "a label must be 0..9, got 10"),
        (batch(labels=[1, 2, -1]), "a label must be 0..9, got -1"),
        (batch(labels=[1, 2, "cat"]), "a label must be 0..9, got a str"),
        (batch(labels=[1, 2, True]), "a label must be 0..9, got True"),
        (batch(labels=nested(60)[0]), "'labels' must be a list of 3, got 2"),
        (batch(labels=[0, 0, nested(60)]), "a label must be 0..9, got a list"),  # its repr never ends
        (
            batch(rows=ROWS[:, :-1]),
            r"'data' must be an array of bytes \[N, 3072\], got one of shape \[3, 3071\]",
        ),
        (batch(rows=ROWS.astype(np.float32)), "arrays must be of unsigned bytes"),
        (batch(rows=np.asfortranarray(ROWS)), "not a row-major one of bytes"),
        (batch(rows=np.array([None])), "arrays must be of unsigned bytes"),
        (pickle.dumps({b"labels": []}), "'data' must be an array.* got a NoneType"),
        (pickle.dumps([1, 2]), "must hold a dict, got a list"),
        (batch()[:-200], "not a CIFAR-10 python batch"),
    ],
)
def test_broken_batch_is_refused_with_its_reason(content: bytes, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        parse_batch(content, where="batch")


def test_array_whose_bytes_do_not_fill_its_shape_is_refused() -> None:
    content = python2_batch().replace(b"K\x03M\x00\x0c\x86", b"K\x04M\x00\x0c\x86")
    with pytest.raises(DataError, match="do not fill its shape"):
        parse_batch(content, where="batch")


def test_array_made_without_its_state_is_refused() -> None:
    content = b"\x80\x02}(U\x04datacnumpy\nndarray\n)\x81U\x06labels]u."
    with pytest.raises(DataError, match=r"'data' must be an array .* got one of shape \[\]"):
        parse_batch(content, where="batch")


def test_larger_than_any_batch_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpdl.data.cifar.LARGEST_BATCH", 100)
    with pytest.raises(DataError, match="larger than 100 bytes"):
        parse_batch(batch(), where="batch")


def test_links_in_the_tar_are_not_followed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "real")
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in BATCHES[:-1]:
            archive.add(folder / name, arcname=f"cifar-10-batches-py/{name}")
        link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, str(folder / "test_batch")
        archive.addfile(link, io.BytesIO())
    with pytest.raises(DataError, match="has no test_batch"):
        load(path)
