"""What one use of a convolution's weight adds to its per-sample gradients, by the fastest of four ways.

`grouped`, `windows` and `rows` form the gradients (`convolution_gradients.py`); `gram` takes their norms from inner
products (`convolution_gram.py`). Gradients that are not large beside the operands are kept, and the operands dropped:
the weighted sum is then one matrix-vector product. Otherwise the operands are kept, and the weighted sum is one
batched weight gradient of the weighted cotangents.

Which way: the one whose predicted time for norms and weighted sum together is least. A prediction is a sum of
counts, `Layer.counts`, times nanoseconds, `RATES`, for one example. With w numbers in the weight, i and o channels in
a group, U offsets in the kernel, T outputs and S pixels of all images of the example:

    grouped   w T multiplications, more where channels do not fill vectors; both operands copied into blocks of
              channels, c S + o T; for depthwise convolutions w T kernel_size[-1] alone
    windows   w T multiplications, i U T numbers copied in stretches of a row of the output; o T for each group
    rows      w T multiplications, the copy smaller by kernel_size[0], but o T numbers read again for each of its rows
    gram      i S^2 + o T^2 multiplications, then a few operations on T^2 numbers for each row of the kernel
    sum       of what was not kept: as grouped, without a gradient for each example

and, where gradients are formed, w for writing and w for keeping. On the 38 layers of `benchmarks/convolution_rules.py`
(1, 2 and 3 axes, grouped, depthwise, dilated, with strides; batches of 16 to 512) the way picked took at most 1.22
times as long as the best; the median was 1.00. With the plainest of rules, all constants 1, it was 2.3.

Two more ways were tried and dropped, as never best: one product for each offset of the kernel on channels-last
images, and products and sums over positions for depthwise convolutions.

Axes: n example, k image of an example, i input channel, o output channel, u kernel offset, s input position,
t output position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dpdl.per_sample.squared_norms import squared_norms
from dpdl.per_sample.tape.contribution import Contribution, Materialized
from dpdl.per_sample.tape.convolution_gradients import (
    CPU_BLOCK,
    Geometry,
    batched_gradient,
    blocks,
    gradient_rows,
    numbers_at_work,
)
from dpdl.per_sample.tape.convolution_gram import gram_norms

__all__ = ["MATERIALIZING", "RATES", "WAYS", "ConvolutionContribution", "Geometry", "Layer", "fastest_way"]

# Per-sample gradients are kept while they are at most this many times as large as their operands. A plain step keeps
# the operands too (the input, and the output or its gradient). Where gradients are larger, keeping gains little: for
# the 16 -> 32 4x4/2 layer of a small MNIST network, 2.3 times, 256 examples took 10.8 ms kept and 10.5 ms dropped.
KEPT_OVER_OPERANDS = 2.0

# Squared norms from inner products in float32 are used where rounding moves them by no more than this, relatively.
# Elsewhere terms cancel, and inner products are taken in float64. In a small network of convolutions, group
# normalisation and ReLU, with 256 positions or fewer, the margin was below 7e-5 for every example.
GRAM_TOLERANCE = 1.5e-4

MATERIALIZING = ("grouped", "windows", "rows")
WAYS = (*MATERIALIZING, "gram")

# Nanoseconds a count, in the order of `Layer.counts`, on one core of an EPYC with AVX-512; only ratios matter. From
# `python -m benchmarks.convolution_rules --fit`, three runs; those of "gram" from its layers without groups.
RATES: dict[str, tuple[float, ...]] = {
    "grouped": (0.022, 0.00017, 0.12, 1.2, 0.062, 2.2, 0.0),
    "windows": (0.025, 0.3, 6.3, 1.3, 0.0, 0.91, 0.44),
    "rows": (0.024, 0.42, 13.0, 0.58, 0.0, 2.5, 0.47),
    "gram": (0.03, 0.0, 0.64, 0.0),
    "sum": (0.022, 0.0, 0.097, 0.038, 0.78),
}

# Channels that a grouped or batched convolution works on at a time, and to which it rounds up.
VECTOR = 16


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The sizes that decide what a way costs, for one example.

    Attributes:
        images: k.
        sizes: the input's spatial sizes.
        outputs: the output's.
        shape: of the weight.
    """

    images: int
    sizes: tuple[int, ...]
    outputs: tuple[int, ...]
    shape: tuple[int, ...]
    geometry: Geometry

    @property
    def weight(self) -> int:
        """Numbers in the weight."""
        return math.prod(self.shape)

    @property
    def operands(self) -> int:
        """Numbers in the input and in the output's gradient."""
        channels = self.shape[1] * self.geometry.groups
        return self.images * (channels * math.prod(self.sizes) + self.shape[0] * math.prod(self.outputs))

    def counts(self, way: str, kept: bool) -> tuple[float, ...]:
        """What a way of computing norms, or "sum", does how often."""
        geometry, groups = self.geometry, self.geometry.groups
        i, o, offsets = self.shape[1], self.shape[0] // groups, geometry.offsets
        positions, pixels = self.images * math.prod(self.outputs), self.images * math.prod(self.sizes)
        first, last = geometry.kernel_size[0], self.outputs[-1]
        multiplications = self.weight * positions
        result = (self.weight, self.weight * kept)
        if way in ("grouped", "sum"):
            padded = groups * (_whole(i) * pixels + _whole(o) * positions)
            wasted = (groups * offsets * _whole(i) * _whole(o) - self.weight) * positions
            by_depth = 0.0
            if i == o == 1:  # another kernel, whose vectors run over the groups
                padded, wasted, by_depth = 0, 0, multiplications * geometry.kernel_size[-1]
            counts = (multiplications, wasted, by_depth, padded, self.operands)
            return counts if way == "sum" else (*counts, *result)
        if way == "windows":
            copied = groups * i * offsets * positions
            return (multiplications, copied, copied / last, groups * o * positions, groups, *result)
        if way == "rows":
            unfolded = groups * i * offsets / first * geometry.extent(self.outputs)[0] * positions / self.outputs[0]
            narrow = first * groups * o * positions
            return (multiplications, unfolded, unfolded / last, narrow, first * groups, *result)
        products = groups * (i * pixels**2 + o * positions**2)
        sums, sizes = 0.0, list(self.sizes)
        for axis, kernel in enumerate(geometry.kernel_size):
            sizes[axis] = self.outputs[axis]
            sums += groups * kernel * (self.images * math.prod(sizes)) ** 2
        return (products, groups * (pixels**2 + positions**2), sums, groups)

    def nanoseconds(self, way: str, keeps_gradients: bool) -> float:
        """Predicted time of norms and weighted sum for one example."""
        kept = keeps_gradients and way != "gram"
        total = _dot(RATES[way], self.counts(way, kept))
        return total if kept else total + _dot(RATES["sum"], self.counts("sum", False))


def _whole(channels: int) -> int:
    """Channels rounded up to whole vectors."""
    return -(-channels // VECTOR) * VECTOR


def _dot(rates: Sequence[float], counts: Sequence[float]) -> float:
    return sum(rate * count for rate, count in zip(rates, counts, strict=True))


@lru_cache(maxsize=1024)
def fastest_way(layer: Layer, keeps_gradients: bool, device: str, among: tuple[str, ...] = WAYS) -> str:
    """The way whose predicted time is least.

    Args:
        device: its type. A convolution of thousands of groups is slow outside the CPU, and is not considered there.
    """
    usable = [way for way in among if way != "grouped" or device == "cpu"]
    return min(usable, key=lambda way: layer.nanoseconds(way, keeps_gradients))


class ConvolutionContribution(Contribution):
    """Per-sample gradients of a convolution's weight.

    A transposed convolution is one with the two operands exchanged: its input is the cotangent, and the gradient of
    its output the input. The input may therefore extend beyond what the outputs cover.

    Args:
        inputs: [N, k, channels, *s].
        cotangents: gradient of the output, [N, k, o, *t].
        weight_shape: (o, channels / groups, *kernel).
        geometry: how the kernel moves.
        way: "grouped", "windows", "rows" or "gram"; by default the one that should be fastest.
    """

    def __init__(
        self,
        inputs: Tensor,
        cotangents: Tensor,
        weight_shape: Sequence[int],
        geometry: Geometry,
        *,
        way: str | None = None,
    ) -> None:
        self._shape = tuple(weight_shape)
        self._geometry = geometry
        self._forced_way = way
        self._operands: tuple[Tensor, Tensor] | None = (inputs, cotangents)
        self._gradients: Tensor | None = None
        assert self._shape[2:] == geometry.kernel_size
        assert inputs.dim() == cotangents.dim() == len(self._shape) + 1
        assert inputs.shape[:2] == cotangents.shape[:2]
        assert inputs.dtype == cotangents.dtype
        assert cotangents.shape[2] == self._shape[0]
        assert inputs.shape[2] == self._shape[1] * geometry.groups

    @property
    def way(self) -> str:
        """How norms are computed, or were."""
        if self._operands is None:
            return "kept"
        return self._forced_way or fastest_way(self._layer(), self.keeps_gradients, self._operands[0].device.type)

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients, if formed, are kept."""
        layer = self._layer()
        return layer.weight <= KEPT_OVER_OPERANDS * layer.operands

    def _norms_squared(self) -> Tensor:
        """Gradients formed on the way are kept in place of the operands, if not too large."""
        if self._gradients is not None:
            return squared_norms(self._gradients)
        way = self.way
        if way == "gram":
            return self._gram_norms()
        if self.keeps_gradients:
            self._gradients = self.materialize()
            self._operands = None
            return squared_norms(self._gradients)
        return self._norms_of_dropped(way)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Weighted sum of the gradients; an example of weight 0 takes no part, whatever is in it."""
        weights = weights.to(self._dtype)
        total = self._weighted_sum(weights, slice(None))
        if torch.isfinite(total.sum()):
            return total
        # 0 * NaN: leave out what has no weight. Seldom needed, so not done before.
        chosen = weights.nonzero().squeeze(1)
        return self._weighted_sum(weights[chosen], chosen)

    def materialize(self) -> Tensor:
        """The gradients, [N, o, i, *u]."""
        if self._gradients is not None:
            return self._gradients
        x, g = self._both_operands()
        gradients = x.new_empty(x.shape[0], *self._shape)
        for block, rows in gradient_rows(self._materializing_way, x, g, self._shape, self._geometry):
            gradients[block] = rows
        return gradients

    def gradient_blocks(self) -> Iterator[Tensor]:
        """The gradients, a few examples at a time; kept in place of the operands if not too large."""
        if self._gradients is not None:
            yield from self._gradients.split(max(1, CPU_BLOCK["windows"] // max(1, self._gradients[0].numel())))
            return
        x, g = self._both_operands()
        gradients = x.new_empty(x.shape[0], *self._shape) if self.keeps_gradients else None
        for block, rows in gradient_rows(self._materializing_way, x, g, self._shape, self._geometry):
            if gradients is not None:
                gradients[block] = rows
            yield rows
        if gradients is not None:
            self._gradients, self._operands = gradients, None

    @property
    def _materializing_way(self) -> str:
        way = self.way
        if way != "gram":
            return way
        return fastest_way(self._layer(), True, self._both_operands()[0].device.type, MATERIALIZING)

    def rows(self, index: Tensor) -> ConvolutionContribution | Materialized:
        """The same for the examples at `index` only."""
        if self._gradients is not None:
            return Materialized(self._gradients[index])
        x, g = self._both_operands()
        return ConvolutionContribution(x[index], g[index], self._shape, self._geometry, way=self._forced_way)

    def double(self) -> ConvolutionContribution | Materialized:
        """The same in float64; exactly so while the operands are there."""
        if self._gradients is not None:
            return Materialized(self._gradients.double())
        x, g = self._both_operands()
        return ConvolutionContribution(x.double(), g.double(), self._shape, self._geometry, way=self._forced_way)

    def joined(self, others: Sequence[Contribution]) -> ConvolutionContribution | None:
        """Uses of one geometry and of inputs of one size are as many images of the example."""
        pairs = [self._operands]
        for other in others:
            if not isinstance(other, ConvolutionContribution) or not self._is_like(other):
                return None
            pairs.append(other._operands)
        operands = [pair for pair in pairs if pair is not None]
        if len(operands) < len(pairs):  # one is kept as gradients
            return None
        x = torch.cat([x for x, _ in operands], dim=1)
        g = torch.cat([g for _, g in operands], dim=1)
        return ConvolutionContribution(x, g, self._shape, self._geometry, way=self._forced_way)

    def _is_like(self, other: ConvolutionContribution) -> bool:
        if self._operands is None or other._operands is None:
            return False
        return (self._shape, self._geometry) == (other._shape, other._geometry) and all(
            (a.shape[0], a.shape[2:], a.dtype, a.device) == (b.shape[0], b.shape[2:], b.dtype, b.device)
            for a, b in zip(self._operands, other._operands, strict=True)
        )

    def _both_operands(self) -> tuple[Tensor, Tensor]:
        assert self._operands is not None, "gradients are kept instead"
        return self._operands

    def _layer(self) -> Layer:
        x, g = self._both_operands()
        return Layer(
            images=x.shape[1],
            sizes=tuple(x.shape[3:]),
            outputs=tuple(g.shape[3:]),
            shape=self._shape,
            geometry=self._geometry,
        )

    def _norms_of_dropped(self, way: str) -> Tensor:
        x, g = self._both_operands()
        squared = x.new_empty(x.shape[0])
        for block, gradients in gradient_rows(way, x, g, self._shape, self._geometry):
            squared[block] = squared_norms(gradients)
        return squared

    def _gram_norms(self) -> Tensor:
        """Norms from inner products, in float64 where rounding could show."""
        x, g = self._both_operands()
        squared, error = x.new_empty(x.shape[0]), x.new_empty(x.shape[0])
        numbers = numbers_at_work("gram", x, g, self._shape, self._geometry)
        for block in blocks("gram", x.shape[0], numbers, x.device):
            squared[block], error[block] = gram_norms(x[block], g[block], self._geometry)
        if x.dtype != torch.float64:
            unsure = (~(error <= GRAM_TOLERANCE * squared)).nonzero().squeeze(1)
            if len(unsure) > 0:
                squared[unsure] = self.rows(unsure).double().norms_squared().to(squared.dtype)
                error[unsure] = 0.0
        return squared + error  # not below the truth

    @property
    def _dtype(self) -> torch.dtype:
        return self._both_operands()[0].dtype if self._gradients is None else self._gradients.dtype

    def _weighted_sum(self, weights: Tensor, chosen: slice | Tensor) -> Tensor:
        """The sum over some examples, with a weight for each of those."""
        if self._gradients is not None:
            rows = self._gradients.flatten(1)[chosen]
            return torch.mv(rows.t(), weights).view(self._shape)
        x, g = self._both_operands()
        weighted = g[chosen] * weights.view(-1, *[1] * (g.dim() - 1))
        return batched_gradient(x[chosen], weighted, self._shape, self._geometry)
