"""What `ImageData` refuses to hold."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dpdl.data import ImageData
from dpdl.errors import DataError


def image_data(**changes: object) -> ImageData:
    fields: dict[str, object] = {
        "train_images": torch.zeros(3, 1, 4, 4),
        "train_labels": torch.tensor([0, 1, 1]),
        "test_images": torch.zeros(1, 1, 4, 4),
        "test_labels": torch.tensor([1]),
        "classes": ("a", "b"),
        "name": "blank",
        "source": "memory",
    }
    return ImageData(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train_images": torch.zeros(3, 4, 4)}, r"train part of memory: images must be \[N, C, H, W\]"),
        (
            {"test_images": torch.zeros(1, 1, 4, 4, dtype=torch.uint8)},
            "test part of memory: images must .*uint8",
        ),
        ({"train_labels": torch.tensor([0, 1])}, r"labels must be \[3\] int64, one an image, got \[2\]"),
        ({"train_labels": torch.tensor([0.0, 1.0, 1.0])}, "labels must be .*float32"),
        ({"test_labels": torch.tensor([2])}, r"labels must be 0\.\.1, one a class, got 2\.\.2"),
        ({"train_labels": torch.tensor([0, -1, 1])}, r"got -1\.\.1"),
        ({"test_images": torch.zeros(0, 1, 4, 4), "test_labels": torch.tensor([]).long()}, "no images"),
        (
            {"test_images": torch.zeros(1, 3, 4, 4)},
            r"train images are \[1, 4, 4\], but test images are \[3, 4, 4\]",
        ),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        image_data(**changes)


def test_image_data_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        image_data().name = "other"  # type: ignore[misc]


def test_repr_is_one_line_and_shows_no_pixels() -> None:
    assert repr(image_data()) == "blank: 3 train and 1 test images of 1x4x4, 2 classes, from memory"
