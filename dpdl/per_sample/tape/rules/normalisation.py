"""Normalisations with a learned scale and shift: layer, group, instance, RMS, and batch by running statistics.

Axes: n example, k rows of an example, c what scale and shift are learned for, the rest positions. With x the
normalised input and g the gradient of the output, the scale receives the sum of g x over positions and the shift
that of g. The normalised input is computed again when g arrives: cheaper than keeping it. Group norms keep their means
and deviations instead, where PyTorch's own kernel can take both sums in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpdl.per_sample.tape.contribution import Contribution, Materialized
from dpdl.per_sample.tape.rules.rule import Rule, RuleCall
from dpdl.per_sample.tape.source import Source

__all__ = ["RULES"]

Normalise = Callable[[Tensor, Any, Any], Tensor]  # input, weight, bias


def layer_norm(
    call: RuleCall,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    def normalise(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return torch.layer_norm(x, normalized_shape, w, b, eps, cudnn_enable)

    return _affine(call, input, normalise, weight, bias, learned_last=len(normalized_shape))


def rms_norm(
    call: RuleCall,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    def normalise(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return torch.rms_norm(x, normalized_shape, w, eps)

    return _affine(call, input, normalise, weight, None, learned_last=len(normalized_shape))


def group_norm(
    call: RuleCall,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    if weight is not None and bias is not None and _takes_statistics(call, input, weight, bias):
        return _group_norm_by_statistics(call, input, num_groups, weight, bias, eps)

    def normalise(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return torch.group_norm(x, num_groups, w, b, eps, cudnn_enabled)

    return _affine(call, input, normalise, weight, bias)


def _takes_statistics(call: RuleCall, input: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether PyTorch's own kernels can be called on a group norm's operands as they are."""
    axis = call.axis(input)
    return (
        call.source(weight) is not None
        and call.source(input) is None
        and axis is not None
        and axis.position == 0
        and input.ndim > 2
        and input.is_contiguous()
        and input.numel() > 0
        and input.dtype in (torch.float32, torch.float64)
        and input.dtype == weight.dtype == bias.dtype
        and not torch.is_autocast_enabled(input.device.type)
    )


def _group_norm_by_statistics(
    call: RuleCall, input: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Any:
    """The same with means and deviations kept, and both gradients from PyTorch's own kernel.

    To it all rows together are one image of n * channels channels in n * groups groups: its gradients of scale and
    shift are then those of each row.
    """
    axis, output_axis = call.axis(input), call.output_axis
    if axis is None or output_axis is None:
        return NotImplemented
    of_weight, of_bias = call.source(weight), call.source(bias)
    rows, channels = input.shape[:2]
    positions = input[0, 0].numel()
    output, mean, deviation = torch.native_group_norm(
        input, call.constant(weight), call.constant(bias), rows, channels, positions, groups, eps
    )

    def contributions(kept: tuple[Tensor, ...], gradient: Tensor) -> Iterable[tuple[Source, Contribution]]:
        x, means, inverse_deviations = kept
        _, scale, shift = torch.ops.aten.native_group_norm_backward(
            gradient.contiguous().view(1, rows * channels, positions),
            x.view(1, rows * channels, positions),
            means.view(1, rows * groups),
            inverse_deviations.view(1, rows * groups),
            x.new_ones(rows * channels),  # it may not be left out
            1, rows * channels, positions, rows * groups, (False, True, True),
        )  # fmt: skip
        for source, found in ((of_weight, scale), (of_bias, shift)):
            if source is not None:
                total = call.front(found.view(rows, channels), axis)  # [n, k, c]
                yield source, Materialized(total.squeeze(1) if total.shape[1] == 1 else total.sum(1))

    return call.tap(output, (input, mean.detach(), deviation.detach()), contributions, of_weight, of_bias)


def batch_norm(
    call: RuleCall,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """By running statistics; by those of the batch examples mix, and no rule applies."""
    if training or running_mean is None:
        return NotImplemented

    def normalise(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return torch.batch_norm(x, w, b, running_mean, running_var, False, momentum, eps, cudnn_enabled)

    return _affine(call, input, normalise, weight, bias)


def instance_norm(
    call: RuleCall,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """By an example's own statistics, or by running ones that are not updated."""
    if use_input_stats and running_mean is not None:
        return NotImplemented

    def normalise(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return torch.instance_norm(x, w, b, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled)

    return _affine(call, input, normalise, weight, bias)


def _affine(
    call: RuleCall,
    input: Tensor,
    normalise: Normalise,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    learned_last: int | None = None,
) -> Any:
    """The normalisation, with contributions to scale and shift.

    Args:
        learned_last: how many trailing axes scale and shift have; None: they are per channel, on the second axis.
    """
    axis, output_axis = call.axis(input), call.output_axis
    if axis is None or output_axis is None or call.source(input) is not None:
        return NotImplemented
    if axis.position != 0 if learned_last is None else axis.position >= input.ndim - learned_last:
        return NotImplemented
    of_weight, of_bias = call.source(weight), call.source(bias)
    output = normalise(input, call.constant(weight), call.constant(bias))
    last = 1 if learned_last is None else learned_last

    def per_example(values: Tensor) -> Tensor:
        """[n, *shape of the scale]: sums over an example's positions."""
        if learned_last is None:
            return values.flatten(3).sum(3).sum(1) if values.ndim > 3 else values.sum(1)  # [n, k, c, ...]
        return values.flatten(1, -last - 1).sum(1)

    def contributions(kept: tuple[Tensor, ...], gradient: Tensor) -> Iterable[tuple[Source, Contribution]]:
        g = call.front(gradient, output_axis)
        if of_weight is not None:
            x = call.front(normalise(kept[0], None, None), axis)
            yield of_weight, Materialized(per_example(g * x))
        if of_bias is not None:
            yield of_bias, Materialized(per_example(g))

    return call.tap(output, (input,) if of_weight is not None else (), contributions, of_weight, of_bias)


RULES: dict[Any, Rule] = {
    torch.layer_norm: layer_norm,
    torch.rms_norm: rms_norm,
    torch.group_norm: group_norm,
    torch.batch_norm: batch_norm,
    torch.instance_norm: instance_norm,
}
