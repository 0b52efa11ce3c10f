"""What is read when a folder or file is named, and what is said when nothing fits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dpdl.data import load
from dpdl.errors import DataError

DATA = os.environ.get("DPDL_DATA")


def assert_lists_every_format(message: str) -> None:
    for word in (
        "train-images-idx3-ubyte",
        "cifar-10-python.tar.gz",
        "data_batch_1",
        "train/CLASS",
        "exdb/mnist",
    ):
        assert word in message


def test_missing_path_says_what_is_read_and_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist") as caught:
        load(tmp_path / "nowhere")
    assert_lists_every_format(str(caught.value))


def test_empty_folder_says_what_is_read_and_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data set of a known format") as caught:
        load(str(tmp_path))
    assert_lists_every_format(str(caught.value))


def test_unknown_file_says_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"data\.zip is of no known format") as caught:
        load(tmp_path / "data.zip")
    assert_lists_every_format(str(caught.value))


def test_several_archives_ask_for_one(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar.gz", "._c.tar"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"holds 2 archives \(a\.tar, b\.tar\.gz\): name the one"):
        load(tmp_path)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match=f"{tmp_path}/nowhere does not exist"):
        load("~/nowhere")


@pytest.mark.skipif(DATA is None, reason="DPDL_DATA names no folder with mnist/ and cifar10/")
class TestRealData:
    """The whole sets; needs DPDL_DATA."""

    def test_mnist(self) -> None:
        data = load(Path(DATA or "") / "mnist")
        assert data.train_images.shape == (60_000, 1, 28, 28)
        assert data.train_labels.bincount().tolist()[:3] == [5923, 6742, 5958]
        assert len(data.test_labels) == 10_000

    @pytest.mark.slow
    def test_cifar10_as_images(self) -> None:
        data = load(Path(DATA or "") / "cifar10")
        assert data.train_images.shape == (50_000, 3, 32, 32)
        assert data.train_labels.bincount().tolist() == [5000] * 10
        assert data.test_labels.bincount().tolist() == [1000] * 10
