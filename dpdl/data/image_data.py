"""The value that every reader returns: a labelled image set, split into train and test, in memory.

Axes: n image, c channel, h row, w column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpdl.errors import DataError

# Told what is being read, how much of it has been, and of how much, None if that is not known.
Progress = Callable[[str, int, int | None], None]
"""Told (what is being read, how much is done, how much there is): files or bytes, whichever is known.

The third is None where the whole is unknown. The last call of a reading has done == whole.
"""

LARGEST_PIXEL = 255.0  # of an 8-bit channel: what becomes 1.0


def no_progress(what: str, done: int, whole: int | None) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageData:
    """Labelled images, split into train and test, normalised to [0, 1].

    Args:
        train_images: shape [N, C, H, W], float32, in [0, 1].
        train_labels: shape [N], int64, index into classes.
        test_images: shape [M, C, H, W], float32, in [0, 1].
        test_labels: shape [M], int64, index into classes.
        classes: names of the classes, in the order of their labels.
        name: what the data is called in reports.
        source: where it was read from.

    Raises:
        DataError: the tensors do not belong together: shape, type, count or range of labels.

    Example:
        >>> import torch
        >>> images, labels = torch.zeros(2, 1, 28, 28), torch.tensor([0, 1])
        >>> data = ImageData(train_images=images, train_labels=labels, test_images=images[:1],
        ...                  test_labels=labels[:1], classes=("no", "yes"), name="blank", source="memory")
        >>> print(data)
        blank: 2 train and 1 test images of 1x28x28, 2 classes, from memory
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    name: str
    source: str

    def __post_init__(self) -> None:
        for split, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            where = f"{split} part of {self.source}"
            if images.ndim != 4 or images.dtype != torch.float32:
                found = f"{list(images.shape)} {images.dtype}"
                raise DataError(f"{where}: images must be [N, C, H, W] float32, got {found}.")
            if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
                found = f"{list(labels.shape)} {labels.dtype}"
                raise DataError(f"{where}: labels must be [{len(images)}] int64, one an image, got {found}.")
            if len(images) == 0:
                raise DataError(f"{where}: there are no images.")
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= len(self.classes):
                allowed = f"0..{len(self.classes) - 1}"
                raise DataError(f"{where}: labels must be {allowed}, one a class, got {low}..{high}.")
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            train, test = list(self.train_images.shape[1:]), list(self.test_images.shape[1:])
            raise DataError(f"{self.source}: train images are {train}, but test images are {test} [C, H, W].")

    def __str__(self) -> str:
        train, test = len(self.train_labels), len(self.test_labels)
        shape = "x".join(str(size) for size in self.train_images.shape[1:])
        counts = f"{train} train and {test} test images of {shape}, {len(self.classes)} classes"
        return f"{self.name}: {counts}, from {self.source}"

    __repr__ = __str__  # the dataclass's own would print every pixel


def unit_interval(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """8-bit pixels as float32 in [0, 1], same shape, in memory of its own."""
    return torch.from_numpy(np.divide(pixels, LARGEST_PIXEL, dtype=np.float32, order="C"))
