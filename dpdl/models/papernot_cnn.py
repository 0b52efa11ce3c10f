"""The tanh network of the private MNIST tables, 26,010 parameters at 28 x 28 x 1 and ten classes.

Tanh in place of ReLU keeps activations, and with them gradient norms, in a narrow range, so that clipping
cuts less away [1]. [2] takes the same network over as its end-to-end baseline.

The first convolution pads by 3 here, which keeps a stride of 2 at exactly half of 28. The code of [2] pads by
2; both end at 4 x 4 x 32, so the number of parameters is the same.

References:
    [1] Papernot, Thakurta, Song, Chien, Erlingsson, Tempered Sigmoid Activations for Deep Learning with
        Differential Privacy, 2021, Table 1. arXiv:2007.14191
    [2] Tramèr and Boneh, Differentially Private Learning Needs Better Features (or Much More Data), 2021,
        appendix on experimental setup. arXiv:2011.11660
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from accountants.errors import ParameterError

SMALLEST_SIDE = 14  # pixels: below it the second pooling has nothing left to pool
HIDDEN = 32


def papernot_cnn(*, in_channels: int = 1, image_size: tuple[int, int] = (28, 28), classes: int = 10) -> nn.Sequential:
    """Two tanh convolutions, each followed by a pooling of stride 1, then two linear layers.

    Args:
        in_channels: C of the images.
        image_size: H and W of the images, each at least 14.
        classes: number of logits.

    Returns:
        A network from [N, C, H, W] to logits [N, classes].

    Raises:
        ParameterError: the images are too small.

    Example:
        >>> sum(weights.numel() for weights in papernot_cnn().parameters())
        26010

    References:
        Papernot et al., 2021. arXiv:2007.14191, Table 1; Tramèr and Boneh, 2021. arXiv:2011.11660.
    """
    if min(image_size) < SMALLEST_SIDE:
        raise ParameterError(f"image_size must be at least {SMALLEST_SIDE} a side, got {image_size}. Use 'mlp'.")
    height, width = (_side_after(side) for side in image_size)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 16, kernel_size=8, stride=2, padding=3),  # [N, 16, 14, 14]
            tanh1=nn.Tanh(),
            pool1=nn.MaxPool2d(kernel_size=2, stride=1),  # [N, 16, 13, 13]
            conv2=nn.Conv2d(16, 32, kernel_size=4, stride=2),  # [N, 32, 5, 5]
            tanh2=nn.Tanh(),
            pool2=nn.MaxPool2d(kernel_size=2, stride=1),  # [N, 32, 4, 4]
            flatten=nn.Flatten(),
            linear1=nn.Linear(32 * height * width, HIDDEN),
            tanh3=nn.Tanh(),
            linear2=nn.Linear(HIDDEN, classes),
        )
    )


def _side_after(side: int) -> int:
    """Pixels left of a side after the two convolutions and poolings."""
    side = (side + 2 * 3 - 8) // 2 + 1 - 1
    return (side - 4) // 2 + 1 - 1
