"""The tanh network of the private CIFAR-10 tables, 550,570 parameters at 32 x 32 x 3 and ten classes.

Layout as in the published code of [2]: three stages of two 3 x 3 convolutions (32, 64, 128 channels), each
stage closed by a 2 x 2 max-pooling, then linear layers of 128 and ten. [2] feeds it images normalised by
channel (mean 0.485, 0.456, 0.406, standard deviation 0.229, 0.224, 0.225); `dpdl.data` gives plain [0, 1].

References:
    [1] Papernot, Thakurta, Song, Chien, Erlingsson, Tempered Sigmoid Activations for Deep Learning with
        Differential Privacy, 2021. arXiv:2007.14191
    [2] Tramèr and Boneh, Differentially Private Learning Needs Better Features (or Much More Data), 2021.
        arXiv:2011.11660; code: ftramer/Handcrafted-DP, models.py, CIFAR10_CNN
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from accountants.errors import ParameterError

STAGES = (32, 64, 128)  # channels
HIDDEN = 128
SMALLEST_SIDE = 2 ** len(STAGES)  # pixels: each stage halves


def tramer_boneh_cifar_cnn(
    *, in_channels: int = 3, image_size: tuple[int, int] = (32, 32), classes: int = 10
) -> nn.Sequential:
    """Six tanh convolutions in three stages, then two linear layers.

    Args:
        in_channels: C of the images.
        image_size: H and W of the images, each at least 8. The first linear layer grows with H times W.
        classes: number of logits.

    Returns:
        A network from [N, C, H, W] to logits [N, classes].

    Raises:
        ParameterError: the images are too small.

    Example:
        >>> sum(weights.numel() for weights in tramer_boneh_cifar_cnn().parameters())
        550570

    References:
        Tramèr and Boneh, 2021. arXiv:2011.11660; Papernot et al., 2021. arXiv:2007.14191 (the module has both).
    """
    if min(image_size) < SMALLEST_SIDE:
        raise ParameterError(f"image_size must be at least {SMALLEST_SIDE} a side, got {image_size}. Use 'mlp'.")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for stage, width in enumerate(STAGES, start=1):
        for half in "ab":
            layers[f"conv{stage}{half}"] = nn.Conv2d(channels, width, kernel_size=3, padding=1)
            layers[f"tanh{stage}{half}"] = nn.Tanh()
            channels = width
        layers[f"pool{stage}"] = nn.MaxPool2d(kernel_size=2, stride=2)
    pixels = (image_size[0] // SMALLEST_SIDE) * (image_size[1] // SMALLEST_SIDE)
    layers["flatten"] = nn.Flatten()
    layers["linear1"] = nn.Linear(channels * pixels, HIDDEN)
    layers["tanh4"] = nn.Tanh()
    layers["linear2"] = nn.Linear(HIDDEN, classes)
    return nn.Sequential(layers)
