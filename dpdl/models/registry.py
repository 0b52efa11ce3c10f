"""Models by name, for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from accountants.errors import ParameterError
from dpdl.models.dense import logistic, mlp
from dpdl.models.papernot_cnn import SMALLEST_SIDE, papernot_cnn
from dpdl.models.tramer_boneh_cifar_cnn import tramer_boneh_cifar_cnn

CIFAR_SIDE = 32  # pixels: from here on the deeper network is the automatic choice


class _Builder(Protocol):
    def __call__(self, *, in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module: ...


_BUILDERS: Mapping[str, _Builder] = {
    "papernot-cnn": papernot_cnn,
    "cifar-cnn": tramer_boneh_cifar_cnn,
    "mlp": mlp,
    "logistic": logistic,
}

# What build_model takes; "auto" is chosen by the size of the images.
MODEL_NAMES = ("auto", *_BUILDERS)


def build_model(name: str = "auto", *, in_channels: int, image_size: int | tuple[int, int], classes: int) -> nn.Module:
    """The named model, freshly initialised, for images of the given shape.

    Args:
        name: "papernot-cnn", "cifar-cnn", "mlp" or "logistic"; "auto" chooses by the smaller side of the
            images: "mlp" below 14 pixels, "papernot-cnn" from 14 to 31, "cifar-cnn" from 32.
        in_channels: C of the images.
        image_size: H and W of the images; one number for square ones.
        classes: number of logits, at least 2.

    Returns:
        A module from [N, C, H, W] to logits [N, classes].

    Raises:
        ParameterError: unknown name, a size below 1, or images too small for the model.

    Example:
        >>> import torch
        >>> model = build_model(in_channels=1, image_size=(28, 28), classes=10)
        >>> model(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 10])
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    for what, value, least in (
        ("in_channels", in_channels, 1),
        ("image_size", min(height, width), 1),
        ("classes", classes, 2),
    ):
        if value < least:
            raise ParameterError(f"{what} must be at least {least}, got {value}.")
    if name == "auto":
        name = automatic_name((height, width))
    if name not in _BUILDERS:
        raise ParameterError(f"model must be one of {', '.join(MODEL_NAMES)}, got {name!r}.")
    return _BUILDERS[name](in_channels=in_channels, image_size=(height, width), classes=classes)


def automatic_name(image_size: tuple[int, int]) -> str:
    """The model that "auto" stands for.

    Args:
        image_size: height and width.

    Example:
        >>> automatic_name((28, 28)), automatic_name((32, 32)), automatic_name((8, 8))
        ('papernot-cnn', 'cifar-cnn', 'mlp')
    """
    side = min(image_size)
    if side < SMALLEST_SIDE:
        return "mlp"
    return "papernot-cnn" if side < CIFAR_SIDE else "cifar-cnn"
