"""Convolutions and transposed convolutions in one, two and three dimensions.

A transposed convolution's weight gradient is that of a convolution with operand and output exchanged: it maps the
gradient of its output to that of its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpdl.per_sample.tape.contribution import Contribution, Materialized
from dpdl.per_sample.tape.convolution import ConvolutionContribution, Geometry
from dpdl.per_sample.tape.rules.rule import Rule, RuleCall
from dpdl.per_sample.tape.source import Source

__all__ = ["RULES"]

Sizes = int | Sequence[int]
_CONVOLUTIONS = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}
_TRANSPOSED = {3: torch.conv_transpose1d, 4: torch.conv_transpose2d, 5: torch.conv_transpose3d}


def convolution(
    call: RuleCall,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: str | Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Any:
    """torch.conv1d, conv2d, conv3d."""
    if not _is_data_and_weight(call, input, weight):
        return NotImplemented
    kernel = tuple(weight.shape[2:])
    dilations = _each(dilation, len(kernel))
    before, after = _padding(padding, kernel, dilations)
    even = before == after
    geometry = Geometry(
        kernel_size=kernel,
        stride=_each(stride, len(kernel)),
        padding=before if even else (0,) * len(kernel),
        dilation=dilations,
        groups=groups,
    )
    output = _CONVOLUTIONS[input.ndim](
        input, call.constant(weight), call.constant(bias), stride, padding, dilation, groups
    )

    def weight_gradient(x: Tensor, g: Tensor) -> Contribution:
        if not even:  # "same" with an even kernel: the border is wider on one side
            border = [width for sides in zip(reversed(before), reversed(after), strict=True) for width in sides]
            x = F.pad(x.flatten(0, 1), border).unflatten(0, x.shape[:2])
        return ConvolutionContribution(x, g, tuple(weight.shape), geometry)

    return _tapped(call, output, input, weight, bias, weight_gradient)


def transposed_convolution(
    call: RuleCall,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Any:
    """torch.conv_transpose1d, conv_transpose2d, conv_transpose3d."""
    if not _is_data_and_weight(call, input, weight):
        return NotImplemented
    kernel = tuple(weight.shape[2:])
    geometry = Geometry(
        kernel_size=kernel,
        stride=_each(stride, len(kernel)),
        padding=_each(padding, len(kernel)),
        dilation=_each(dilation, len(kernel)),
        groups=groups,
    )
    output = _TRANSPOSED[input.ndim](
        input, call.constant(weight), call.constant(bias), stride, padding, output_padding, groups, dilation
    )

    def weight_gradient(x: Tensor, g: Tensor) -> Contribution:
        return ConvolutionContribution(g, x, tuple(weight.shape), geometry)

    return _tapped(call, output, input, weight, bias, weight_gradient)


def _is_data_and_weight(call: RuleCall, input: Tensor, weight: Tensor) -> bool:
    axis = call.axis(input)
    batched = axis is not None and axis.position == 0 and input.ndim == weight.ndim
    return batched and call.source(input) is None and call.axis(weight) is None


def _tapped(
    call: RuleCall, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, weight_gradient: Any
) -> Tensor:
    of_weight, of_bias = call.source(weight), call.source(bias)
    axis, output_axis = call.axis(input), call.output_axis
    assert axis is not None  # _is_data_and_weight

    def contributions(kept: tuple[Tensor, ...], gradient: Tensor) -> Iterable[tuple[Source, Contribution]]:
        g = call.front(gradient, output_axis or axis)  # [n, k, o, ...]
        if of_weight is not None:
            yield of_weight, weight_gradient(call.front(kept[0], axis), g)
        if of_bias is not None:
            yield of_bias, Materialized(g.flatten(3).sum(3).sum(1))

    return call.tap(output, (input,) if of_weight is not None else (), contributions, of_weight, of_bias)


def _each(value: Sizes, dimensions: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


def _padding(
    padding: str | Sizes, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths of the zero border before and after, for each dimension."""
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    if padding == "valid":
        return (0,) * len(kernel), (0,) * len(kernel)
    assert not isinstance(padding, str)  # torch has refused any other
    widths = _each(padding, len(kernel))
    return widths, widths


RULES: dict[Any, Rule] = {
    **dict.fromkeys(_CONVOLUTIONS.values(), convolution),
    **dict.fromkeys(_TRANSPOSED.values(), transposed_convolution),
}
