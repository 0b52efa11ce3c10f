"""Norms of a convolution's per-sample weight gradients without forming the gradients.

With p_t the window of the input under output position t and g_t the gradient there,

    |sum_t g_t p_t^T|^2 = sum_{t, t'} <p_t, p_t'> <g_t, g_t'>

(Goodfellow, Efficient Per-Example Gradient Computations, 2015, arXiv:1510.01799, for one position; Bu et al.,
Scalable and Efficient Training of Large Convolutional Neural Networks with Differential Privacy, 2022,
arXiv:2205.10683, for windows). Windows overlap, so their inner products need not be formed from windows:

    <p_t, p_t'> = sum_u <x_{s(t,u)}, x_{s(t',u)}>        s(t,u) = t * stride + u * dilation - padding,

a sum of shifted pieces of the inner products of *pixels*. It is taken one spatial axis at a time, so a kernel of
3 x 3 x 3 costs 3 + 3 + 3 additions. Pixels of the padding are zero and are left out.

Axes: n example and group of channels, k image of an example, c channel, t output position, s input position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpdl.per_sample.tape.convolution_gradients import Geometry, by_group

__all__ = ["gram_norms"]

# Error of the sum, over eps * (sum_t |p_t| |g_t|)^2. The greatest seen was 3, over random, constant, alternating and
# smooth images of up to 1024 positions and 256 channels; where positions differ, it is a hundredth of that.
# (python -m benchmarks.convolution_rules --rounding)
ROUNDINGS = 4.0


def gram_norms(x: Tensor, g: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Squared norms, and what rounding may have taken from or added to each.

    Args:
        x, g: [n, k, c, *s] and [n, k, o, *t].

    Returns:
        Two tensors [n]. Where the second is not small beside the first, terms have cancelled, or numbers were too
        small to be multiplied: wider ones are called for.
    """
    examples, groups, outputs = x.shape[0], geometry.groups, tuple(g.shape[3:])
    of_windows = window_products(by_group(x, groups), tuple(x.shape[3:]), outputs, geometry)
    vectors = by_group(g, groups)
    of_gradients = torch.bmm(vectors.mT, vectors)
    numbers = torch.finfo(x.dtype)
    # Products below the smallest normal number may be lost: at most `tiny` each. Adding tiny / (ROUNDINGS * eps) a
    # factor to a squared length makes the bound on rounding cover that loss too.
    lost = numbers.tiny / (ROUNDINGS * numbers.eps)
    window_lengths = _diagonal(of_windows) + lost * geometry.offsets * (x.shape[2] // groups)
    gradient_lengths = _diagonal(of_gradients) + lost * vectors.shape[1]
    bound = (window_lengths.sqrt() * gradient_lengths.sqrt()).sum(1).square()
    squared = of_windows.mul_(of_gradients).sum(2).sum(1).clamp(min=0)
    error = ROUNDINGS * numbers.eps * bound
    return squared.view(examples, groups).sum(1), error.view(examples, groups).sum(1)


def window_products(x: Tensor, sizes: tuple[int, ...], outputs: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Inner products of windows.

    Args:
        x: [n, c, k and s].

    Returns:
        [n, k and t, k and t], memory of its own.
    """
    images = x.shape[2] // math.prod(sizes)
    products = torch.bmm(x.mT, x).view(x.shape[0] * images, *sizes, images, *sizes)
    for axis in range(len(sizes)):
        products = _sum_over_offsets(products, axis, outputs[axis], geometry)
    positions = images * math.prod(outputs)
    return products.view(x.shape[0], positions, positions)


def _sum_over_offsets(products: Tensor, axis: int, outputs: int, geometry: Geometry) -> Tensor:
    """From pixels to windows along one spatial axis, in both of the places where that axis stands."""
    first, second = 1 + axis, 2 + len(geometry.stride) + axis
    size, stride = products.shape[first], geometry.stride[axis]
    shape = list(products.shape)
    shape[first] = shape[second] = outputs
    total = products.new_zeros(shape)
    for offset in range(geometry.kernel_size[axis]):
        shift = offset * geometry.dilation[axis] - geometry.padding[axis]
        start = max(0, -(shift // stride))  # the first output whose pixel, t * stride + shift, is not padding
        stop = min(outputs, (size - 1 - shift) // stride + 1)
        if start >= stop:
            continue
        pixels = slice(start * stride + shift, (stop - 1) * stride + shift + 1, stride)
        piece = _both(products, first, second, pixels)
        _both(total, first, second, slice(start, stop)).add_(piece)
    return total


def _both(tensor: Tensor, first: int, second: int, part: slice) -> Tensor:
    index = [slice(None)] * tensor.dim()
    index[first] = index[second] = part
    return tensor[tuple(index)]


def _diagonal(squares: Tensor) -> Tensor:
    return squares.diagonal(dim1=1, dim2=2)
