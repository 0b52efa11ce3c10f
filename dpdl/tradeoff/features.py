"""Fixed features of images: histograms of oriented gradients, computed from each image alone.

A linear model on good fixed features is the strongest small private model there is [2]: few parameters to add noise
to, and features that cost no privacy, because nothing in them is learned or measured from the data. Each image's
features are a function of that image only, with constants that stand here; so one record is still one record.

As in [1]: finite differences, each pixel's gradient shared between the two nearest of eight signed orientations,
summed in cells of 4 x 4 pixels, normalised by the energy of the 3 x 3 cells around. Of several colour channels each
pixel takes the one with the steepest gradient; the cell's mean of each channel is added, centred at one half.

References:
    [1] Dalal, Triggs, Histograms of Oriented Gradients for Human Detection, CVPR 2005.
    [2] Tramèr, Boneh, Differentially Private Learning Needs Better Features (or Much More Data), 2021.
        arXiv:2011.11660
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpdl.errors import ParameterError

__all__ = ["oriented_gradients"]

ORIENTATIONS = 8
CELL = 4  # pixels a side
FLOOR = 0.05  # of a neighbourhood's energy: flat regions are not blown up; 1 is a black-to-white edge in each pixel
CHUNK = 2000  # images at once; bounds memory, changes nothing else


def oriented_gradients(images: Tensor) -> Tensor:
    """Histograms of oriented gradients of each image.

    Args:
        images: shape [N, C, H, W], in [0, 1], H and W at least 4.

    Returns:
        Shape [N, F, H // 4, W // 4] with F = 8, and C more for images in colour; float32. Each image's features are
        of that image alone, and have L2 norm at most 1.

    Raises:
        ParameterError: the images are of another shape, or smaller than a cell.

    Example:
        >>> oriented_gradients(torch.rand(2, 1, 28, 28)).shape, oriented_gradients(torch.rand(2, 3, 32, 32)).shape
        (torch.Size([2, 8, 7, 7]), torch.Size([2, 11, 8, 8]))
    """
    if images.ndim != 4 or min(images.shape[2:]) < CELL:
        raise ParameterError(f"images must be [N, C, H, W] of at least {CELL} pixels a side, got {list(images.shape)}.")
    with torch.no_grad():
        return torch.cat([_features(part) for part in images.split(CHUNK)])


def _features(images: Tensor) -> Tensor:
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    across = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2  # [n, C, H, W]
    down = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    steepest = (across.square() + down.square()).argmax(1, keepdim=True)
    across, down = across.gather(1, steepest), down.gather(1, steepest)  # [n, 1, H, W]
    turn = torch.atan2(down, across) / (2 * math.pi) * ORIENTATIONS % ORIENTATIONS  # in units of a bin
    bins = torch.arange(ORIENTATIONS, dtype=images.dtype).view(1, -1, 1, 1)
    apart = (turn - bins).abs()
    share = (1 - torch.minimum(apart, ORIENTATIONS - apart)).clamp(min=0)  # 1 in all, over two bins
    cells = F.avg_pool2d(share * torch.hypot(across, down), CELL)  # [n, orientations, H / 4, W / 4]
    energy = F.avg_pool2d(cells.square().sum(1, keepdim=True), 3, stride=1, padding=1).sqrt()
    features = cells / (energy + FLOOR)
    if images.shape[1] > 1:
        features = torch.cat([features, F.avg_pool2d(images, CELL) - 0.5], dim=1)
    return F.normalize(features.flatten(1), eps=1e-6).view_as(features)
