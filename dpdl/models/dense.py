"""Networks of linear layers alone: for images of any size, and for what must be quick or convex."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

HIDDEN = 128


def logistic(*, in_channels: int = 1, image_size: tuple[int, int] = (28, 28), classes: int = 10) -> nn.Sequential:
    """Multinomial logistic regression on the pixels, convex under cross-entropy.

    Args:
        in_channels: C of the images.
        image_size: H and W of the images.
        classes: number of logits.

    Returns:
        A network from [N, C, H, W] to logits [N, classes].

    Example:
        >>> sum(weights.numel() for weights in logistic().parameters())
        7850
    """
    pixels = in_channels * math.prod(image_size)
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=nn.Linear(pixels, classes)))


def mlp(*, in_channels: int = 1, image_size: tuple[int, int] = (28, 28), classes: int = 10) -> nn.Sequential:
    """One hidden layer of 128 with tanh.

    Args:
        in_channels: C of the images.
        image_size: H and W of the images.
        classes: number of logits.

    Returns:
        A network from [N, C, H, W] to logits [N, classes].

    Example:
        >>> sum(weights.numel() for weights in mlp().parameters())
        101770
    """
    pixels = in_channels * math.prod(image_size)
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            linear1=nn.Linear(pixels, HIDDEN),
            tanh=nn.Tanh(),
            linear2=nn.Linear(HIDDEN, classes),
        )
    )
