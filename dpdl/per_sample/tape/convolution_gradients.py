"""Per-sample gradients of a convolution's weight, formed one block of examples at a time.

For one example, with x its input, g the gradient of its output and u an offset in the kernel,

    gradient[o, i, u] = sum_{k, t} g[k, o, t] * x[k, i, t * stride + u * dilation - padding].

Three ways to compute it, equal but for rounding; which is fastest depends on the layer (`convolution.py`):

- `grouped`: PyTorch's own weight gradient of one convolution in which each example is a group of channels
  (Rochette et al., Efficient Per-Example Gradient Computations in Convolutional Neural Networks, 2019,
  arXiv:1912.06015).
- `windows`: a matrix product with the input's windows, copied out (im2col).
- `rows`: windows along all spatial axes but the first. What an offset along the first axis needs then lies
  contiguously and is multiplied where it is: the copy is smaller by the kernel's length, the products are narrower.

Axes: n example, k image of an example, c channel, i input channel within a group of channels, o output channel,
u offset in the kernel, t output position, s input position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "MATERIALIZE",
    "Geometry",
    "batched_gradient",
    "blocks",
    "by_group",
    "gradient_rows",
    "numbers_at_work",
]

# Numbers in the work space of one block of examples. On the CPU that of products should stay in the second-level
# cache (2^18 float32 numbers are 1 MiB); a grouped convolution costs some 50 us to call, and wants more. Without
# blocks, some layers took 4 times as long: the system hands out large buffers page by page.
# (python -m benchmarks.convolution_rules --blocks) Other devices should be filled by a block.
CPU_BLOCK = {"grouped": 2**20, "windows": 2**18, "rows": 2**18, "gram": 2**18}
DEVICE_BLOCK = 2**27


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a convolution's kernel moves over its input; each tuple has an entry per spatial axis.

    Attributes:
        kernel_size, stride, dilation: at least 1.
        padding: zeros on either side, at least 0.
        groups: groups of channels that do not see each other.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __post_init__(self) -> None:
        assert len(self.kernel_size) == len(self.stride) == len(self.padding) == len(self.dilation)
        assert min(*self.kernel_size, *self.stride, *self.dilation, self.groups) >= 1
        assert min(self.padding) >= 0

    @property
    def offsets(self) -> int:
        """Positions in the kernel."""
        return math.prod(self.kernel_size)

    def extent(self, outputs: tuple[int, ...]) -> tuple[int, ...]:
        """Length of the padded input that the windows of so many outputs cover, along each axis."""
        return tuple(
            (t - 1) * stride + (kernel - 1) * dilation + 1
            for t, kernel, stride, dilation in zip(outputs, self.kernel_size, self.stride, self.dilation, strict=True)
        )


def covered(x: Tensor, geometry: Geometry, lengths: tuple[int, ...]) -> Tensor:
    """The input, padded in front as the geometry says and cut or filled up behind to the given lengths.

    Args:
        x: [..., *s].
    """
    pads: list[int] = []
    for size, length, padding in zip(x.shape[-len(lengths) :], lengths, geometry.padding, strict=True):
        pads = [padding, length - padding - size, *pads]
    return F.pad(x, pads) if any(pads) else x


def weight_gradient(x: Tensor, g: Tensor, shape: tuple[int, ...], geometry: Geometry, groups: int) -> Tensor:
    """PyTorch's weight gradient of a convolution, summed over the leading axis.

    Args:
        x: [images, channels, *s]; may extend beyond what the outputs cover.
        g: [images, channels, *t].
    """
    spatial = len(geometry.stride)
    extent, padding = geometry.extent(tuple(g.shape[2:])), geometry.padding
    surplus = [s + 2 * p - e for s, p, e in zip(x.shape[2:], padding, extent, strict=True)]
    # PyTorch wants exactly as many outputs as fit. Those of a transposed convolution may be fewer.
    if any(not 0 <= rest < stride for rest, stride in zip(surplus, geometry.stride, strict=True)):
        x, padding = covered(x, geometry, extent), (0,) * spatial
    arguments = (geometry.stride, padding, geometry.dilation, False, (0,) * spatial, groups, (False, True, False))
    shape_only = x.new_empty(shape)  # the weight's values are not looked at, but some kernels want its strides
    with _whole_numbers(x.device):
        # Strides as those of a new tensor: some kernels choose their result's by the operands' (also where an axis of
        # size 1 makes several right), and then refuse it.
        operands = (g.reshape(-1).view(g.shape), x.reshape(-1).view(x.shape))
        result: Tensor = torch.ops.aten.convolution_backward(*operands, shape_only, None, *arguments)[1]
    return result


def _whole_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Products of float32 numbers as they are: TensorFloat-32, the default of convolutions, leaves 3 digits."""
    cudnn = torch.backends.cudnn
    if device.type != "cuda":
        return nullcontext()
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    context: AbstractContextManager[None] = cudnn.flags(**kept, allow_tf32=False)
    return context


def batched_gradient(x: Tensor, g: Tensor, shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    """sum_n gradient_n, by one weight gradient over the batch.

    Args:
        x, g: [n, k, c, *s] and [n, k, o, *t].

    Returns:
        [o, i, *u].
    """
    if x.shape[0] == 0:
        return x.new_zeros(shape)
    return weight_gradient(x.flatten(0, 1), g.flatten(0, 1), shape, geometry, geometry.groups)


def grouped(x: Tensor, g: Tensor, shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Each example a group of channels of one convolution."""
    examples = x.shape[0]
    x, g = x.transpose(0, 1).flatten(1, 2), g.transpose(0, 1).flatten(1, 2)
    groups = examples * geometry.groups
    return weight_gradient(x, g, (examples * shape[0], *shape[1:]), geometry, groups).view(examples, *shape)


def windows(x: Tensor, g: Tensor, shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Windows copied out, then one matrix product an example and group."""
    examples, images, channels = x.shape[:3]
    outputs = tuple(g.shape[3:])
    x = covered(x, geometry, geometry.extent(outputs))
    n, k, c, *steps = x.stride()
    view = x.as_strided(
        (examples, channels, *geometry.kernel_size, images, *outputs),
        (n, c, *_times(steps, geometry.dilation), k, *_times(steps, geometry.stride)),
    )
    products = examples * geometry.groups
    columns = view.reshape(products, math.prod(shape[1:]), images * math.prod(outputs))
    return torch.bmm(by_group(g, geometry.groups), columns.mT).view(examples, *shape)


def rows(x: Tensor, g: Tensor, shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Windows along all axes but the first, then one product an example, group and offset along the first."""
    total = _rows(x[:, 0], g[:, :1], shape, geometry)
    for image in range(1, x.shape[1]):
        total = total + _rows(x[:, image], g[:, image : image + 1], shape, geometry)
    return total


def _rows(x: Tensor, g: Tensor, shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    examples, channels = x.shape[:2]
    outputs, rest = tuple(g.shape[3:]), geometry.kernel_size[1:]
    stride, dilation = geometry.stride[0], geometry.dilation[0]
    extent = geometry.extent(outputs)
    # Every stride-th row of the input, and `stride` such sets: within one, consecutive outputs lie side by side.
    length = -(-extent[0] // stride)
    x = covered(x, geometry, (length * stride, *extent[1:])).contiguous()
    n, c, row, *steps = x.stride()
    view = x.as_strided(
        (examples, channels, *rest, stride, length, *outputs[1:]),
        (n, c, *_times(steps, geometry.dilation[1:]), row, row * stride, *_times(steps, geometry.stride[1:])),
    )
    products, width = examples * geometry.groups, math.prod(outputs[1:])
    columns = view.reshape(products, shape[1] * math.prod(rest), stride, length * width)
    g, positions = by_group(g, geometry.groups), math.prod(outputs)
    result = x.new_empty(geometry.kernel_size[0], products, g.shape[1], columns.shape[1])
    for offset in range(geometry.kernel_size[0]):
        first, phase = divmod(offset * dilation, stride)
        seen = columns[:, :, phase, first * width : first * width + positions]
        torch.bmm(g, seen.mT, out=result[offset])
    return result.view(-1, examples, *shape[:2], *rest).movedim(0, 3).contiguous()


def by_group(g: Tensor, groups: int) -> Tensor:
    """[n, k, o, *t] to [n and group, o within the group, k and t]."""
    return g.transpose(1, 2).reshape(g.shape[0] * groups, g.shape[2] // groups, -1)


def _times(steps: list[int], factors: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(step * factor for step, factor in zip(steps, factors, strict=True))


Materialize = Callable[[Tensor, Tensor, tuple[int, ...], Geometry], Tensor]
MATERIALIZE: dict[str, Materialize] = {"grouped": grouped, "windows": windows, "rows": rows}


def numbers_at_work(way: str, x: Tensor, g: Tensor, shape: tuple[int, ...], geometry: Geometry) -> int:
    """Numbers that a way of `MATERIALIZE`, or "gram", works on for one example, roughly."""
    outputs, weight = tuple(g.shape[3:]), math.prod(shape)
    extent = geometry.extent(outputs)
    if way == "windows":
        return x.shape[1] * x.shape[2] * geometry.offsets * math.prod(outputs) + weight
    if way == "rows":
        across = math.prod(geometry.kernel_size[1:]) * math.prod(outputs[1:])
        return x.shape[2] * across * (extent[0] + geometry.stride[0]) + 2 * weight
    if way == "gram":
        pixels, positions = x.shape[1] * math.prod(x.shape[3:]), x.shape[1] * math.prod(outputs)
        return geometry.groups * (pixels**2 + positions**2)
    return math.prod(x.shape[1:]) + math.prod(g.shape[1:]) + weight


def blocks(way: str, examples: int, numbers: int, device: torch.device) -> Iterator[slice]:
    """Consecutive examples, as many at a time as together work on no more numbers than a block should have.

    Args:
        numbers: of one example.
    """
    size = max(1, (CPU_BLOCK[way] if device.type == "cpu" else DEVICE_BLOCK) // numbers)
    for start in range(0, examples, size):
        yield slice(start, min(start + size, examples))


def gradient_rows(
    way: str, x: Tensor, g: Tensor, shape: tuple[int, ...], geometry: Geometry
) -> Iterator[tuple[slice, Tensor]]:
    """Per-sample gradients block by block: which examples, and their gradients [block, o, i, *u]."""
    numbers = numbers_at_work(way, x, g, shape, geometry)
    for block in blocks(way, x.shape[0], numbers, x.device):
        yield block, MATERIALIZE[way](x[block], g[block], shape, geometry)
