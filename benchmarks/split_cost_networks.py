"""VGG-16 and ResNet-50 as sequences that can be cut after any layer or block. torchvision's are not needed.

References:
    [1] Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014.
        arXiv:1409.1556, table 1, configuration D.
    [2] He et al., Deep Residual Learning for Image Recognition, 2015. arXiv:1512.03385, table 1.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

__all__ = ["Stem", "resnet50", "vgg16"]

Stem = Literal["3x3", "7x7"]
_VGG_16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions between poolings [1]
_RESNET_50 = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # width, blocks, stride of the first [2]
_WIDEN = 4


def vgg16(*, classes: int, hidden: int | None = 4096) -> nn.Sequential:
    """For 32 x 32 images: thirteen convolutions, then three linear layers, or one with hidden=None."""
    layers: list[nn.Module] = []
    before = 3
    for channels, convolutions in _VGG_16:
        for _ in range(convolutions):
            layers.append(nn.Sequential(nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()))
            before = channels
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    if hidden is not None:
        layers += [
            nn.Sequential(nn.Linear(before, hidden), nn.ReLU()),
            nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()),
        ]
        before = hidden
    return nn.Sequential(*layers, nn.Linear(before, classes))


def resnet50(*, classes: int, stem: Stem) -> nn.Sequential:
    """Stem, sixteen bottleneck blocks, pooling and a linear layer.

    Args:
        classes: outputs.
        stem: "7x7": stride 2 and max pooling, as for ImageNet [2]; "3x3": stride 1 and none, usual for 32 x 32 images.
    """
    first: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())]
    if stem == "7x7":
        convolution = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        first = [nn.Sequential(convolution, nn.BatchNorm2d(64), nn.ReLU()), nn.MaxPool2d(3, stride=2, padding=1)]
    blocks: list[nn.Module] = []
    before = 64
    for width, count, stride in _RESNET_50:
        for number in range(count):
            blocks.append(Bottleneck(before, width, stride=1 if number else stride))
            before = _WIDEN * width
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride), 1 x 1, and a projection where the shape changes."""

    def __init__(self, before: int, width: int, *, stride: int) -> None:
        super().__init__()
        after = _WIDEN * width
        self.residual = nn.Sequential(
            nn.Conv2d(before, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))
        self.end = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[N, before, H, W] to [N, 4 width, H / stride, W / stride]."""
        found: Tensor = self.end(self.residual(x) + self.shortcut(x))
        return found
