"""Conversions of one normalisation: what comes out computes what its name says, and keeps what can be kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dpdl.errors import ModelError, ParameterError
from dpdl.validation import (
    FrozenBatchNorm,
    batch_norm_to_group_norm,
    batch_norm_to_instance_norm,
    batch_norm_to_layer_norm,
    default_num_groups,
    freeze_norm,
    instance_norm_without_statistics,
)

N, CHANNELS = 5, 12
INPUTS = {
    nn.BatchNorm1d: (N, CHANNELS, 7),
    nn.BatchNorm2d: (N, CHANNELS, 3, 4),
    nn.BatchNorm3d: (N, CHANNELS, 2, 3, 2),
    nn.SyncBatchNorm: (N, CHANNELS, 3, 4),
}
INSTANCE = {nn.BatchNorm1d: nn.InstanceNorm1d, nn.BatchNorm2d: nn.InstanceNorm2d, nn.BatchNorm3d: nn.InstanceNorm3d}
every_batch_norm = pytest.mark.parametrize("kind", INPUTS, ids=lambda kind: kind.__name__)


def seen_data(norm: nn.Module) -> nn.Module:
    """As after training: no parameter or statistic is what it started as."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(norm, name)
            if tensor is not None:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return norm


def inputs(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> Tensor:
    return (2 * torch.randn(INPUTS[kind], generator=torch.Generator().manual_seed(4)) + 1).to(dtype)


def normalised(x: Tensor, groups: int, eps: float) -> Tensor:
    """Each example's groups of channels brought to mean 0 and variance 1, one by one."""
    y = torch.empty_like(x)
    each = x.shape[1] // groups
    for n in range(len(x)):
        for g in range(groups):
            part = x[n, g * each : (g + 1) * each]
            mean = part.sum() / part.numel()
            variance = ((part - mean) ** 2).sum() / part.numel()
            y[n, g * each : (g + 1) * each] = (part - mean) / (variance + eps).sqrt()
    return y


def scaled(y: Tensor, norm: nn.Module) -> Tensor:
    shape = (1, -1, *[1] * (y.ndim - 2))
    return y * norm.weight.view(shape) + norm.bias.view(shape)


CONVERSIONS: dict[str, tuple[Callable[[nn.Module], nn.Module], int]] = {
    "group": (batch_norm_to_group_norm, 12),
    "group, 3": (lambda norm: batch_norm_to_group_norm(norm, 3), 3),
    "layer": (batch_norm_to_layer_norm, 1),
    "instance": (batch_norm_to_instance_norm, CHANNELS),
}


@every_batch_norm
@pytest.mark.parametrize("name", CONVERSIONS)
def test_what_comes_out_normalises_each_example_and_scales_as_before(name: str, kind: type[nn.Module]) -> None:
    norm = seen_data(kind(CHANNELS, eps=0.1).double())
    convert, groups = CONVERSIONS[name]
    if name == "group" and kind is nn.BatchNorm1d:
        groups = 1  # inputs may be [N, C]
    replacement = convert(norm)
    expected = scaled(normalised(inputs(kind), groups, eps=0.1), norm)
    torch.testing.assert_close(replacement(inputs(kind)), expected)


@every_batch_norm
@pytest.mark.parametrize(
    ("mode", "trained", "dtype"),
    [(True, True, torch.float64), (False, True, torch.bfloat16), (True, False, torch.half)],
)
@pytest.mark.parametrize("name", [*CONVERSIONS, "frozen"])
def test_parameters_move_over_as_they_are(
    name: str, mode: bool, trained: bool, dtype: torch.dtype, kind: type[nn.Module]
) -> None:
    norm = seen_data(kind(CHANNELS).to(dtype)).train(mode).requires_grad_(trained)
    replacement = freeze_norm(norm) if name == "frozen" else CONVERSIONS[name][0](norm)
    assert replacement.weight is norm.weight
    assert replacement.bias is norm.bias
    assert replacement.weight.dtype == dtype
    assert replacement.weight.requires_grad == trained
    assert replacement.training == mode
    assert replacement.eps == norm.eps


def test_parameters_stay_on_their_device() -> None:
    for convert in (
        batch_norm_to_group_norm,
        batch_norm_to_instance_norm,
        lambda m: batch_norm_to_layer_norm(m, [4, 2]),
    ):
        assert convert(nn.BatchNorm1d(4, device="meta")).weight.device.type == "meta"


@every_batch_norm
def test_without_parameters_none_appear(kind: type[nn.Module]) -> None:
    norm = kind(CHANNELS, affine=False)
    for convert in (
        *(c for c, _ in CONVERSIONS.values()),
        freeze_norm,
        lambda m: batch_norm_to_layer_norm(m, CHANNELS),
    ):
        replacement = convert(norm)
        assert not list(replacement.parameters())
    torch.testing.assert_close(
        batch_norm_to_group_norm(norm.double(), 4)(inputs(kind)), normalised(inputs(kind), 4, norm.eps)
    )


def test_a_shift_that_is_missing_stays_missing() -> None:
    norm = seen_data(nn.BatchNorm2d(CHANNELS).double())
    norm.register_parameter("bias", None)
    for convert in (*(c for c, _ in CONVERSIONS.values()), lambda m: batch_norm_to_layer_norm(m, (CHANNELS, 3, 4))):
        replacement = convert(norm)
        assert replacement.bias is None
        replacement(inputs(nn.BatchNorm2d))


# ── group normalisation ─────────────────────────────────────────────────────────────────────────────


@given(channels=st.integers(1, 2048), positions=st.integers(1, 64))
def test_the_default_number_of_groups_divides_and_leaves_enough_values(channels: int, positions: int) -> None:
    groups = default_num_groups(channels, positions)
    assert 1 <= groups <= 32
    assert channels % groups == 0
    assert groups == 1 or channels // groups * positions >= 16
    larger = [g for g in range(groups + 1, 33) if channels % g == 0]
    assert all(channels // g * positions < 16 for g in larger)


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 24), (32, 32), (12, 12), (7, 7), (37, 1), (1, 1)])
def test_groups_of_images(channels: int, groups: int) -> None:
    assert batch_norm_to_group_norm(nn.BatchNorm2d(channels)).num_groups == groups


def test_features_without_positions_do_not_become_a_constant() -> None:
    """One channel a group, as 32 groups of 32 channels would be, normalises each value by itself."""
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(5))
    assert nn.GroupNorm(32, 32)(x).abs().max() < 1e-3
    assert batch_norm_to_group_norm(nn.BatchNorm1d(32))(x).std() > 0.5


@pytest.mark.parametrize("num_groups", [5, 0, -3, 24, 2.0, True, "default"])
def test_a_number_of_groups_that_does_not_fit_is_refused(num_groups: object) -> None:
    with pytest.raises(ParameterError, match=r"num_groups.*12 channels.*\[1, 2, 3, 4, 6, 12\]"):
        batch_norm_to_group_norm(nn.BatchNorm2d(12), num_groups)


# ── layer normalisation ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [CHANNELS, (CHANNELS,)])
def test_layer_norm_of_features_is_that_of_one_group(shape: int | tuple[int, ...]) -> None:
    norm = seen_data(nn.BatchNorm1d(CHANNELS).double())
    x = inputs(nn.BatchNorm1d)[..., 0]
    layer = batch_norm_to_layer_norm(norm, shape)
    assert isinstance(layer, nn.LayerNorm)
    torch.testing.assert_close(layer(x), batch_norm_to_layer_norm(norm)(x))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_layer_norm_of_a_shape_spreads_scale_and_shift_over_positions(kind: type[nn.Module]) -> None:
    norm = seen_data(kind(CHANNELS).double()).requires_grad_(False).eval()
    layer = batch_norm_to_layer_norm(norm, INPUTS[kind][1:])
    torch.testing.assert_close(layer(inputs(kind)), scaled(normalised(inputs(kind), 1, norm.eps), norm))
    assert not layer.weight.requires_grad
    assert not layer.training


@pytest.mark.parametrize("shape", [4, (3, 4), (CHANNELS,), (CHANNELS, 4)])
def test_layer_norm_of_another_shape_starts_anew(shape: int | tuple[int, ...]) -> None:
    """As deepee's `BN_to_LN`: the scale of a channel does not fit a column."""
    norm = seen_data(nn.BatchNorm2d(CHANNELS).double())
    layer = batch_norm_to_layer_norm(norm, shape)
    assert torch.equal(layer.weight, torch.ones_like(layer.weight))
    assert layer.weight.dtype == torch.float64


# ── instance normalisation, frozen statistics ───────────────────────────────────────────────────────


def test_instance_norm_has_the_axes_of_its_batch_norm() -> None:
    for kind, instance in INSTANCE.items():
        replacement = batch_norm_to_instance_norm(kind(CHANNELS))
        assert type(replacement) is instance
        assert not replacement.track_running_stats
        assert replacement.affine
    assert isinstance(batch_norm_to_instance_norm(nn.SyncBatchNorm(CHANNELS)), nn.GroupNorm)


@every_batch_norm
def test_frozen_computes_the_same_to_the_bit_in_both_modes(kind: type[nn.Module]) -> None:
    norm = seen_data(kind(CHANNELS)).eval()
    x = inputs(kind, torch.float32)
    frozen = freeze_norm(norm)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    for mode in (True, False):
        assert torch.equal(frozen.train(mode)(x), norm(x))
    after = frozen.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", INSTANCE.values())
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_loses_its_statistics_and_nothing_else(kind: type[nn.Module], affine: bool) -> None:
    norm = seen_data(kind(CHANNELS, track_running_stats=True, affine=affine, eps=0.1).double())
    x = inputs(next(batch for batch, instance in INSTANCE.items() if instance is kind))
    replacement = instance_norm_without_statistics(norm)
    assert type(replacement) is kind
    assert replacement.weight is norm.weight
    assert not list(replacement.buffers())
    expected = normalised(x, CHANNELS, 0.1)
    expected = scaled(expected, norm) if affine else expected
    torch.testing.assert_close(replacement.train()(x), expected)
    torch.testing.assert_close(replacement.eval()(x), expected)  # deepee: another normalisation in eval mode
    frozen = freeze_norm(norm)
    torch.testing.assert_close(frozen.train()(x), norm.eval()(x))


def test_without_statistics_there_is_nothing_to_freeze() -> None:
    for norm in (nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4)):
        with pytest.raises(ModelError, match="no running statistics"):
            freeze_norm(norm)


def test_a_module_of_another_kind_or_without_a_shape_is_refused() -> None:
    for convert in (batch_norm_to_group_norm, batch_norm_to_layer_norm, batch_norm_to_instance_norm, freeze_norm):
        with pytest.raises(ModelError, match=r"Linear.*replace_modules"):
            convert(nn.Linear(2, 2))
        with pytest.raises(ModelError, match="no shape yet"):
            convert(nn.LazyBatchNorm2d())
    with pytest.raises(ModelError, match="BatchNorm2d"):
        instance_norm_without_statistics(nn.BatchNorm2d(2))


def test_frozen_is_no_batch_norm_and_says_what_it_is() -> None:
    frozen = freeze_norm(nn.BatchNorm2d(4))
    assert not isinstance(frozen, nn.modules.batchnorm._BatchNorm)
    assert repr(frozen) == "FrozenBatchNorm(4, eps=1e-05, affine=True)"
    assert isinstance(frozen, FrozenBatchNorm)
