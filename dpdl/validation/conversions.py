"""Normalisations that mix examples or keep statistics, turned into such that do neither. One function for each.

    >>> batch_norm_to_group_norm(nn.BatchNorm2d(48)).num_groups
    24

Each takes one module and returns another. Scale and shift are not copied: the very parameters move over, and with them
dtype, device, `requires_grad`, ties to other modules and their places in an optimizer. Epsilon and the mode (training
or eval) are carried over; momentum and running statistics have no meaning any more. `replace_modules` in
`dpdl.validation.replacement` applies such functions to a whole model, `dpdl.fix` chooses them.

Group normalisation: Wu and He 2018, arXiv:1803.08494; 32 groups are its default. Layer normalisation of images is
group normalisation with one group, instance normalisation that with a group for each channel (its section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from dpdl.errors import ModelError, ParameterError
from dpdl.validation.frozen_batch_norm import FrozenBatchNorm

__all__ = [
    "MIN_VALUES_PER_GROUP",
    "batch_norm_to_group_norm",
    "batch_norm_to_instance_norm",
    "batch_norm_to_layer_norm",
    "default_num_groups",
    "freeze_norm",
    "instance_norm_without_statistics",
    "refuse_parametrizations",
]

MAX_GROUPS = 32  # Wu and He 2018, section 4.1
# A statistic over fewer values says little of its own: over one, the output is constant; over two, a sign. The same
# paper finds 16 channels a group as good as 32 groups.
MIN_VALUES_PER_GROUP = 16

INSTANCE_NORMS: dict[type[_BatchNorm], type[_InstanceNorm]] = {
    nn.BatchNorm1d: nn.InstanceNorm1d,
    nn.BatchNorm2d: nn.InstanceNorm2d,
    nn.BatchNorm3d: nn.InstanceNorm3d,
}
AXES_WITHOUT_BATCH: dict[type[_BatchNorm], tuple[int, ...]] = {
    nn.BatchNorm1d: (1, 2),
    nn.BatchNorm2d: (3,),
    nn.BatchNorm3d: (4,),
}
ANY_AXES = (1, 2, 3, 4)


def default_num_groups(channels: int, positions: int = MIN_VALUES_PER_GROUP) -> int:
    """The largest divisor of `channels` up to 32 that leaves each group enough values to normalise by.

    Args:
        channels: C.
        positions: places at which each channel has a value; 1 for inputs [N, C].

    Example:
        >>> [default_num_groups(c) for c in (64, 48, 7)], default_num_groups(64, positions=1)
        ([32, 24, 7], 4)
    """
    divisors = (g for g in range(min(MAX_GROUPS, channels), 0, -1) if channels % g == 0)
    return next((g for g in divisors if channels // g * positions >= MIN_VALUES_PER_GROUP), 1)


def batch_norm_to_group_norm(
    module: _BatchNorm, num_groups: int | None = None, *, positions: int | None = None
) -> nn.GroupNorm:
    """Statistics of each example's groups of channels in place of the batch's.

    Args:
        module: BatchNorm1d, 2d, 3d or SyncBatchNorm.
        num_groups: must divide the channels; None for `default_num_groups`.
        positions: at how many places each channel has values, where that is known. Unless it is, BatchNorm1d is taken
            to see [N, C]: 32 groups of one channel each would make its output a constant.

    Raises:
        ParameterError: `num_groups` does not divide the channels.
        ModelError: the module has no shape yet.
    """
    _refuse_other_than(module, _BatchNorm)
    channels = module.num_features
    if num_groups is None:
        known = (1 if isinstance(module, nn.BatchNorm1d) else MIN_VALUES_PER_GROUP) if positions is None else positions
        num_groups = default_num_groups(channels, known)
    if isinstance(num_groups, bool) or not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        divisors = [g for g in range(1, channels + 1) if channels % g == 0]
        raise ParameterError(
            f"num_groups must be an integer that divides the {channels} channels of {type(module).__name__}"
            f"({channels}), got {num_groups!r}. Use one of {divisors}, or None for a number that fits each layer."
        )
    return _with_parameters_of(module, nn.GroupNorm(num_groups, channels, eps=module.eps, affine=False))


def batch_norm_to_layer_norm(
    module: _BatchNorm, normalized_shape: int | Sequence[int] | None = None
) -> nn.GroupNorm | nn.LayerNorm:
    """Statistics of each example's channels and positions together.

    Args:
        module: BatchNorm1d, 2d, 3d or SyncBatchNorm.
        normalized_shape: None for a scale and shift of each channel, as the module has, and inputs of any size: that is
            GroupNorm(1, C), which for [N, C] computes what LayerNorm(C) does. Given, it is that of nn.LayerNorm. If it
            is (C, ...) with an axis for each that the module's inputs have, scale and shift are spread over the
            positions as new parameters; otherwise they do not fit and start at one and zero.

    Raises:
        ModelError: the module has no shape yet.
    """
    if normalized_shape is None:
        return batch_norm_to_group_norm(module, 1)
    _refuse_other_than(module, _BatchNorm)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    like = next(module.parameters(), module.running_mean)
    layer = nn.LayerNorm(
        shape,
        eps=module.eps,
        elementwise_affine=module.affine,
        device=None if like is None else like.device,
        dtype=None if like is None else like.dtype,
    )
    layer.training = module.training
    channels = module.num_features
    fits = shape[0] == channels and len(shape) in _axes_of(module)
    for name in ("weight", "bias"):
        values: Tensor | None = getattr(module, name)
        if values is None:
            setattr(layer, name, None)
            continue
        if fits:
            spread = values.detach().view(channels, *[1] * (len(shape) - 1)).expand(shape)
            setattr(layer, name, nn.Parameter(spread.clone()))
        getattr(layer, name).requires_grad_(values.requires_grad)
    return layer


def batch_norm_to_instance_norm(module: _BatchNorm) -> nn.GroupNorm | _InstanceNorm:
    """Statistics of each example's channels, one by one, over their positions: batch normalisation of one example.

    It takes inputs with several positions: [N, C] has one, and would become a constant. SyncBatchNorm does not say how
    many axes it sees; it becomes GroupNorm(C, C), which is the same for any number.

    Raises:
        ModelError: the module has no shape yet.
    """
    _refuse_other_than(module, _BatchNorm)
    kind = next((new for old, new in INSTANCE_NORMS.items() if isinstance(module, old)), None)
    if kind is None:
        return batch_norm_to_group_norm(module, module.num_features)
    return _with_parameters_of(module, kind(module.num_features, eps=module.eps))


def instance_norm_without_statistics(module: _InstanceNorm) -> _InstanceNorm:
    """The same instance normalisation by each example's own statistics, in eval mode too.

    Raises:
        ModelError: the module has no shape yet.
    """
    _refuse_other_than(module, _InstanceNorm)
    kind = next((k for k in INSTANCE_NORMS.values() if isinstance(module, k)), None)
    if kind is None:
        raise ModelError(
            f"{type(module).__name__} is none of torch's instance normalisations; set track_running_stats=False."
        )
    return _with_parameters_of(module, kind(module.num_features, eps=module.eps))


def freeze_norm(module: _NormBase) -> FrozenBatchNorm:
    """Running statistics as they are now, for good: what the module computes in eval mode.

    Raises:
        ModelError: the module has no running statistics, or no shape yet.
    """
    _refuse_other_than(module, _NormBase)
    if module.running_mean is None or module.running_var is None:
        raise ModelError(
            f"{type(module).__name__}({module.num_features}) has no running statistics to freeze: it normalises by the "
            'data in eval mode too. Replace it, for instance by dpdl.fix(model, batch_norm="group").'
        )
    return FrozenBatchNorm(module)


def _axes_of(module: _BatchNorm) -> tuple[int, ...]:
    return next((axes for kind, axes in AXES_WITHOUT_BATCH.items() if isinstance(module, kind)), ANY_AXES)


Norm = TypeVar("Norm", nn.GroupNorm, _InstanceNorm)


def _with_parameters_of(module: _NormBase, replacement: Norm) -> Norm:
    replacement.weight, replacement.bias = module.weight, module.bias
    replacement.affine = module.affine
    replacement.training = module.training
    return replacement


def _refuse_other_than(module: nn.Module, kind: type[nn.Module]) -> None:
    if not isinstance(module, kind):
        raise ModelError(
            f"A {type(module).__name__} is no {kind.__name__.lstrip('_')}. To convert the parts of a model, use "
            "replace_modules(model, converter) or dpdl.fix(model)."
        )
    if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        raise ModelError(
            f"{type(module).__name__} has no shape yet. Run the model once on a batch that is not private."
        )
    refuse_parametrizations(module)


def refuse_parametrizations(module: nn.Module) -> None:
    """Raise a ModelError if a module's parameters are computed from others, which a replacement would not do."""
    if parametrize.is_parametrized(module):
        raise ModelError(
            f"{type(module).__name__} has parametrizations, which a replacement would lose. Remove them first "
            "(torch.nn.utils.parametrize.remove_parametrizations), and register them again after."
        )
