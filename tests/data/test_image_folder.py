"""Images by class, in a folder and in a tar: written here with Pillow, then spoilt in every way we know."""

from __future__ import annotations

import builtins
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from dpdl.data import load
from dpdl.errors import DataError

Image = pytest.importorskip("PIL.Image")


def pixels(seed: int, channels: int = 3, size: tuple[int, int] = (5, 4)) -> np.ndarray:
    shape = size if channels == 1 else (*size, channels)
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def write_set(root: Path, channels: int = 3) -> Path:
    seed = 0
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "ant"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(pixels(seed, channels)).save(folder / f"{index}.png")
                seed += 1
    return root


def tar(root: Path, path: Path, arcname: str = ".", mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        archive.add(root, arcname=arcname)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_gives_the_pixels_written(tmp_path: Path, channels: int) -> None:
    data = load(write_set(tmp_path / "pets", channels))
    assert data.name == "pets"
    assert data.classes == ("ant", "cat")
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 1]
    expected = torch.tensor(pixels(3, channels).astype(np.float32) / 255).reshape(5, 4, channels)
    assert torch.equal(data.train_images[0], expected.permute(2, 0, 1))
    assert data.train_images.is_contiguous()


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz"), ("tbz2", "w:bz2")])
@pytest.mark.parametrize("arcname", [".", "pets", "a/b"])
def test_tar_gives_what_the_folder_gives(tmp_path: Path, suffix: str, mode: str, arcname: str) -> None:
    root = write_set(tmp_path / "pets")
    (tmp_path / "out").mkdir()
    path = tar(root, tmp_path / "out" / f"pets.{suffix}", arcname, mode)
    from_folder, from_tar, from_its_folder = load(root), load(path), load(path.parent)
    for data in (from_tar, from_its_folder):
        assert torch.equal(data.train_images, from_folder.train_images)
        assert torch.equal(data.test_images, from_folder.test_images)
        assert torch.equal(data.train_labels, from_folder.train_labels)
        assert data.classes == from_folder.classes


def test_order_in_the_tar_does_not_matter(tmp_path: Path) -> None:
    root = write_set(tmp_path / "pets")
    path = tmp_path / "pets.tar"
    with tarfile.open(path, "w") as archive:
        for file in sorted(root.rglob("*.png"), reverse=True):
            archive.add(file, arcname=file.relative_to(root))
    assert torch.equal(load(path).train_images, load(root).train_images)


def test_grey_among_colour_gets_three_equal_channels(tmp_path: Path) -> None:
    root = write_set(tmp_path / "pets")
    Image.fromarray(pixels(9, 1)).save(root / "train" / "ant" / "0.png")
    data = load(root)
    assert data.train_images.shape[1] == 3
    assert torch.equal(data.train_images[0, 0], data.train_images[0, 2])
    assert not torch.equal(data.train_images[1, 0], data.train_images[1, 2])


def test_jpeg_is_read(tmp_path: Path) -> None:
    root = write_set(tmp_path / "pets")
    flat = np.full((5, 4, 3), 200, dtype=np.uint8)
    Image.fromarray(flat).save(root / "train" / "ant" / "9.JPG", format="JPEG")
    assert load(root).train_images[3].mul(255).round().unique().tolist() == [200.0]


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    root = write_set(tmp_path / "pets")
    (root / "train" / ".DS_Store").write_bytes(b"x")
    (root / "train" / "ant" / "._0.png").write_bytes(b"x")
    (root / "README.txt").write_text("about")
    assert len(load(root).train_images) == 6


@pytest.mark.parametrize("packed", [False, True])
class TestRefused:
    """The same complaint, whether the set lies in a folder or in a tar."""

    def refuse(self, root: Path, packed: bool, complaint: str) -> None:
        path = tar(root, root.parent / "pets.tar.gz", mode="w:gz") if packed else root
        with pytest.raises(DataError, match=complaint):
            load(path)

    def test_odd_size_is_named(self, tmp_path: Path, packed: bool) -> None:
        root = write_set(tmp_path / "pets")
        Image.fromarray(pixels(0, size=(6, 4))).save(root / "train" / "cat" / "9.png")
        self.refuse(root, packed, r"train/cat/9\.png in .* has 4 x 6 pixels, but .*\.png has 4 x 5")

    def test_no_test_folder(self, tmp_path: Path, packed: bool) -> None:
        root = write_set(tmp_path / "pets")
        (root / "test").rename(root / "val")
        self.refuse(root, packed, r"has no test/ folder.*train/CLASS/\*\.png and test/CLASS")

    def test_no_train_folder(self, tmp_path: Path, packed: bool) -> None:
        root = write_set(tmp_path / "pets")
        (root / "train").rename(root / "training")
        self.refuse(root, packed, "has no train/ folder")

    def test_empty_class(self, tmp_path: Path, packed: bool) -> None:
        root = write_set(tmp_path / "pets")
        (root / "train" / "bee").mkdir()
        self.refuse(root, packed, "class folder train/bee is empty")

    def test_class_of_one_split_only(self, tmp_path: Path, packed: bool) -> None:
        root = write_set(tmp_path / "pets")
        (root / "test" / "cat" / "0.png").unlink()
        (root / "test" / "cat").rmdir()
        self.refuse(root, packed, "class folder test/cat is missing")

    def test_text_named_as_image(self, tmp_path: Path, packed: bool) -> None:
        root = write_set(tmp_path / "pets")
        (root / "test" / "cat" / "0.png").write_text("hello")
        self.refuse(root, packed, r"test/cat/0\.png in .* is not a readable PNG or JPEG")

    def test_file_that_is_not_named_as_image(self, tmp_path: Path, packed: bool) -> None:
        root = write_set(tmp_path / "pets")
        (root / "test" / "cat" / "notes.txt").write_text("hello")
        self.refuse(root, packed, r"test/cat/notes\.txt in .* is not named \.png")

    def test_other_image_format_behind_the_name(self, tmp_path: Path, packed: bool) -> None:
        root = write_set(tmp_path / "pets")
        Image.fromarray(pixels(0)).save(root / "test" / "cat" / "0.png", format="GIF")
        self.refuse(root, packed, "is not a readable PNG or JPEG")

    def test_truncated_image(self, tmp_path: Path, packed: bool) -> None:
        root = write_set(tmp_path / "pets")
        file = root / "test" / "cat" / "0.png"
        file.write_bytes(file.read_bytes()[:60])
        self.refuse(root, packed, "is not a readable PNG or JPEG")

    def test_alpha_channel(self, tmp_path: Path, packed: bool) -> None:
        root = write_set(tmp_path / "pets")
        Image.fromarray(pixels(0, channels=4)).save(root / "test" / "cat" / "0.png")
        self.refuse(root, packed, "has mode RGBA. Save it as 8-bit grey or RGB")

    def test_sixteen_bits(self, tmp_path: Path, packed: bool) -> None:
        root = write_set(tmp_path / "pets")
        Image.fromarray(pixels(0, 1).astype(np.uint16) * 256).save(root / "test" / "cat" / "0.png")
        self.refuse(root, packed, "has mode I;16. Save it as 8-bit")

    def test_decompression_bomb(self, tmp_path: Path, packed: bool) -> None:
        root = write_set(tmp_path / "pets")
        (root / "test" / "ant" / "0.png").write_bytes(png_that_announces(60_000, 60_000))
        self.refuse(root, packed, "not a readable PNG or JPEG image: .*decompression bomb")

    def test_image_just_over_the_limit(self, tmp_path: Path, packed: bool) -> None:
        root = write_set(tmp_path / "pets")
        (root / "test" / "ant" / "0.png").write_bytes(png_that_announces(4096, 4097))
        self.refuse(root, packed, "4096 x 4097 pixels; the limit is 16777216")

    def test_set_that_does_not_fit_in_memory(
        self, tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dpdl.data.image_folder.LARGEST_SET", 8 * 60 - 1)
        self.refuse(write_set(tmp_path / "pets"), packed, "decodes to more than 479 bytes")


def png_that_announces(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_two_sets_in_one_tar_are_refused(tmp_path: Path) -> None:
    root = write_set(tmp_path / "pets")
    with tarfile.open(tmp_path / "two.tar", "w") as archive:
        archive.add(root, arcname="one")
        archive.add(root, arcname="two")
    with pytest.raises(DataError, match="two sets of images, in one and two"):
        load(tmp_path / "two.tar")


def test_missing_pillow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_set(tmp_path / "pets")
    real_import = builtins.__import__

    def without_pillow(name: str, *args: object) -> object:
        if name == "dpdl.data.image_file":
            raise ModuleNotFoundError("No module named 'PIL'")
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(DataError, match=r"needs Pillow.*pip install 'dpdl\[images\]'"):
        load(root)
