"""Images sorted into folders by class, on disk or in a tar.

    train/CLASS/*.png      or .jpg, .jpeg; 8-bit grey or colour; all of one size
    test/CLASS/*.png       the same classes

A tar may have one more folder around the two, as it does when a folder is packed by its name. Files are taken
in the order of class and name, so folder and tar give the same tensors. Where some images are grey and some
coloured, the grey ones get three equal channels. Hidden files are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch

from dpdl.data.archive import Member, members
from dpdl.data.image_data import ImageData, Progress, no_progress, unit_interval
from dpdl.errors import DataError

if TYPE_CHECKING:
    from dpdl.data.image_file import Pixels

SPLITS = ("train", "test")
SUFFIXES = (".png", ".jpg", ".jpeg")
LARGEST_SET = 4 * 2**30  # bytes, decoded, one a channel and pixel; four times that as float32
FILES_PER_PROGRESS = 256
LAYOUT = "The layout is train/CLASS/*.png and test/CLASS/*.png (or .jpg), in a folder or a tar."


def load_image_folder(path: Path, progress: Progress = no_progress) -> ImageData:
    """Read a folder of images by class, or a tar of one (plain, gzip, xz or bzip2), without unpacking it.

    Args:
        path: the folder that holds train/ and test/, or the tar.
        progress: told of the files read, or of the bytes of the tar.

    Returns:
        Images of shape [N, C, H, W], C being 1 where all are grey and 3 elsewhere; classes sorted by name.

    Raises:
        DataError: Pillow is missing; there is no train/ or test/; a class is empty or in one split only; a
            file is not an image, of another size than the rest, or of too many pixels.
    """
    images, classes = _collect(path, progress)
    names = _class_names(path, images, classes)
    in_colour = any(pixels.ndim == 3 for pixels in images.values())
    tensors = {}
    for split in SPLITS:
        files = sorted(file for file in images if file.parts[0] == split)
        pixels = np.stack([_planes(images.pop(file), in_colour) for file in files])
        tensors[f"{split}_images"] = unit_interval(pixels)
        tensors[f"{split}_labels"] = torch.tensor([names.index(file.parts[1]) for file in files])
    return ImageData(
        train_images=tensors["train_images"],
        train_labels=tensors["train_labels"],
        test_images=tensors["test_images"],
        test_labels=tensors["test_labels"],
        classes=names,
        name=path.name.split(".")[0],
        source=str(path),
    )


def _collect(path: Path, progress: Progress) -> tuple[dict[PurePosixPath, Pixels], dict[str, set[str]]]:
    """Every image by split/CLASS/FILE, and the class folders of each split, empty ones too."""
    try:
        from dpdl.data.image_file import Size, decode  # needs Pillow, an extra; the other readers do without
    except ImportError as error:
        raise DataError(
            f"Reading PNG and JPEG needs Pillow, which cannot be imported ({error}). "
            "Install it with pip install 'dpdl[images]'."
        ) from error

    images: dict[PurePosixPath, Pixels] = {}
    classes: dict[str, set[str]] = {split: set() for split in SPLITS}
    root: PurePosixPath | None = None
    size: Size | None = None
    size_of, decoded = "", 0
    for member in _tree(path, progress) if path.is_dir() else members(path, progress):
        parts = member.path.parts
        depth = 2 if member.is_folder else 3  # train/CLASS, train/CLASS/FILE
        if len(parts) < depth or parts[-depth] not in SPLITS or parts[-1].startswith("."):
            continue
        around = PurePosixPath(*parts[:-depth])
        root = around if root is None else root
        if around != root:
            raise DataError(f"{path} holds two sets of images, in {root} and {around}: take one out. {LAYOUT}")
        classes[parts[-depth]].add(parts[1 - depth])
        if member.is_folder:
            continue
        where = f"{member.path} in {path}"
        if member.path.suffix.lower() not in SUFFIXES:
            names = ", ".join(SUFFIXES)
            raise DataError(f"{where} is not named {names}. Convert it, or take it out. {LAYOUT}")
        pixels = decode(member.read(), where=where, size=size, size_of=size_of)
        if size is None:
            size, size_of = (pixels.shape[1], pixels.shape[0]), str(member.path)
        images[PurePosixPath(*parts[-depth:])] = pixels
        decoded += pixels.nbytes
        if decoded > LARGEST_SET:
            raise DataError(f"{path} decodes to more than {LARGEST_SET} bytes, more than is held in memory.")
    return images, classes


def _tree(path: Path, progress: Progress) -> Iterator[Member]:
    """The folders and files under train/ and test/, sorted, seen as an archive's members."""
    patterns = [f"{split}/{depth}" for split in SPLITS for depth in ("*", "*/*")]
    places = sorted(place for pattern in patterns for place in path.glob(pattern))
    for done, place in enumerate(places):
        if done % FILES_PER_PROGRESS == 0:
            progress(str(path), done, len(places))
        relative = PurePosixPath(place.relative_to(path).as_posix())
        if place.is_dir() or place.is_file():
            yield Member(path=relative, is_folder=place.is_dir(), read=place.read_bytes)
    progress(str(path), len(places), len(places))


def _planes(pixels: Pixels, in_colour: bool) -> Pixels:
    """[H, W] or [H, W, 3] to [C, H, W]."""
    if pixels.ndim == 3:
        return np.moveaxis(pixels, -1, 0)
    return np.broadcast_to(pixels, (3 if in_colour else 1, *pixels.shape))


def _class_names(path: Path, images: dict[PurePosixPath, Pixels], classes: dict[str, set[str]]) -> tuple[str, ...]:
    """The classes, sorted: of both splits, with an image in each."""
    filled = {file.parts[:2] for file in images}
    for split in SPLITS:
        if not classes[split]:
            raise DataError(f"{path} has no {split}/ folder with classes in it. {LAYOUT}")
        for name in sorted(classes["train"] | classes["test"]):
            if (split, name) not in filled:
                state = "is empty" if name in classes[split] else "is missing"
                raise DataError(f"{path}: the class folder {split}/{name} {state}. {LAYOUT}")
    return tuple(sorted(classes["train"]))
