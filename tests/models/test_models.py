"""The models against the tables they come from, and the names they go by."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpdl.errors import ParameterError
from dpdl.models import MODEL_NAMES, automatic_name, build_model


def parameters(model: nn.Module) -> int:
    return sum(weights.numel() for weights in model.parameters())


@pytest.mark.parametrize(
    ("name", "channels", "size", "count"),
    [
        # 16 (64 + 1) + 32 (16 * 16 + 1) + 32 (512 + 1) + 10 (32 + 1)
        ("papernot-cnn", 1, 28, 26_010),
        # 3x3 convolutions 3-32-32-64-64-128-128, linear 2048-128-10
        ("cifar-cnn", 3, 32, 550_570),
        ("mlp", 1, 28, 101_770),
        ("logistic", 1, 28, 7_850),
    ],
)
def test_parameter_count_is_the_papers(name: str, channels: int, size: int, count: int) -> None:
    assert parameters(build_model(name, in_channels=channels, image_size=size, classes=10)) == count


def test_papernot_cnn_has_the_layers_of_the_table() -> None:
    model = build_model("papernot-cnn", in_channels=1, image_size=28, classes=10)
    layers = [type(layer).__name__ for layer in model.children()]
    assert layers == [
        "Conv2d", "Tanh", "MaxPool2d", "Conv2d", "Tanh", "MaxPool2d", "Flatten", "Linear", "Tanh", "Linear",
    ]  # fmt: skip
    x, seen = torch.zeros(2, 1, 28, 28), []
    for layer in model.children():
        x = layer(x)
        seen.append(tuple(x.shape[1:]))
    assert seen[0] == (16, 14, 14)
    assert seen[2] == (16, 13, 13)
    assert seen[3] == (32, 5, 5)
    assert seen[5] == (32, 4, 4)
    assert seen[-1] == (10,)


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (32, 32)), (3, (33, 47)), (1, (14, 64))])
def test_every_model_gives_one_logit_a_class(name: str, channels: int, size: tuple[int, int]) -> None:
    model = build_model(name, in_channels=channels, image_size=size, classes=7)
    assert model(torch.rand(3, channels, *size)).shape == (3, 7)


@pytest.mark.parametrize("name", ["papernot-cnn", "cifar-cnn", "mlp", "logistic"])
def test_no_model_mixes_examples(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, in_channels=1, image_size=28, classes=10).double()
    images = torch.rand(4, 1, 28, 28, dtype=torch.float64)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (8, "mlp"),
        (13, "mlp"),
        (14, "papernot-cnn"),
        (28, "papernot-cnn"),
        (31, "papernot-cnn"),
        (32, "cifar-cnn"),
    ],
)
def test_auto_chooses_by_the_smaller_side(size: int, name: str) -> None:
    assert automatic_name((size, 100)) == name
    assert automatic_name((100, size)) == name


@pytest.mark.parametrize(("name", "smallest"), [("papernot-cnn", 14), ("cifar-cnn", 8)])
def test_images_too_small_for_the_model_are_refused(name: str, smallest: int) -> None:
    model = build_model(name, in_channels=1, image_size=smallest, classes=2)
    assert model(torch.zeros(1, 1, smallest, smallest)).shape == (1, 2)
    with pytest.raises(ParameterError, match=f"at least {smallest} a side"):
        build_model(name, in_channels=1, image_size=(smallest - 1, 100), classes=2)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ParameterError, match="must be one of auto, papernot-cnn, cifar-cnn, mlp, logistic, got 'vgg'"):
        build_model("vgg", in_channels=1, image_size=28, classes=10)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"image_size": (28, 0)}, "image_size must be at least 1, got 0"),
        ({"classes": 1}, "classes must be at least 2, got 1"),
    ],
)
def test_sizes_out_of_range_are_refused(changes: dict, complaint: str) -> None:
    with pytest.raises(ParameterError, match=complaint):
        build_model("mlp", **{"in_channels": 1, "image_size": 28, "classes": 10, **changes})
