"""`ModuleValidator` names what is wrong, and its fixes keep what was learned."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from dpdl.compat.opacus import PrivacyEngine
from dpdl.compat.opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from dpdl.compat.opacus.utils.module_utils import are_state_dict_equal
from dpdl.compat.opacus.validators import ModuleValidator, register_module_fixer, register_module_validator
from dpdl.compat.opacus.validators.errors import (
    IllegalModuleConfigurationError,
    ShouldReplaceModuleError,
    UnsupportableModuleError,
    UnsupportedModuleError,
)
from dpdl.errors import ModelError


def _with_norm() -> nn.Sequential:
    norm = nn.BatchNorm2d(16)
    nn.init.constant_(norm.weight, 3.0)
    nn.init.constant_(norm.bias, -2.0)
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.Sequential(norm))


def test_what_is_wrong_is_named_with_its_path() -> None:
    errors = ModuleValidator.validate(_with_norm())
    assert [type(error) for error in errors] == [ShouldReplaceModuleError]
    assert str(errors[0]).startswith("1.0: BatchNorm2d")
    with pytest.raises(UnsupportedModuleError, match=r"1\.0: BatchNorm2d") as caught:
        ModuleValidator.validate(_with_norm(), strict=True)
    assert isinstance(caught.value, ModelError)
    assert isinstance(caught.value, ValueError)
    assert [type(e) for e in ModuleValidator.validate(nn.Linear(1, 1).eval())] == [IllegalModuleConfigurationError]


def test_fixing_keeps_scale_and_shift_and_leaves_the_model_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = _with_norm()
    with caplog.at_level(logging.INFO):
        fixed = ModuleValidator.fix_and_validate(model)
    assert "Replaced sub_module 1.0" in caplog.text
    norm = fixed.get_submodule("1.0")
    assert isinstance(norm, nn.GroupNorm)
    assert bool((norm.weight == 3.0).all())
    assert bool((norm.bias == -2.0).all())
    assert isinstance(model[1][0], nn.BatchNorm2d)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in fixed.parameters()}
    assert ModuleValidator.is_valid(PrivacyEngine.get_compatible_module(model))


def test_options_of_the_fix() -> None:
    grouped = ModuleValidator.fix(_with_norm(), num_groups=4).get_submodule("1.0")
    assert isinstance(grouped, nn.GroupNorm)
    assert grouped.num_groups == 4
    instance = ModuleValidator.fix(_with_norm(), replace_bn_with_in=True).get_submodule("1.0")
    assert isinstance(instance, nn.InstanceNorm2d)
    assert bool((instance.weight == 3.0).all())
    with pytest.raises(ValueError, match="either"):
        ModuleValidator.fix(_with_norm(), replace_bn_with_in=True, num_groups=4)
    with pytest.raises(UnsupportableModuleError):
        ModuleValidator.fix(nn.Sequential(nn.SyncBatchNorm(4)), replace_bn_with_in=True)


def test_statistics_of_instance_norms_are_found_trainable_or_not() -> None:
    for affine in (True, False):
        model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.InstanceNorm1d(4, affine=affine, track_running_stats=True))
        assert not ModuleValidator.is_valid(model)
        fixed = ModuleValidator.fix_and_validate(model)
        assert not list(fixed.buffers())


@pytest.mark.parametrize(
    ("plain", "renamed"),
    [
        (nn.LSTM(3, 4, proj_size=2), DPLSTM),
        (nn.GRU(3, 4, bidirectional=True), DPGRU),
        (nn.MultiheadAttention(4, 2), DPMultiheadAttention),
    ],
)
def test_layers_that_opacus_replaces_are_renamed(plain: nn.Module, renamed: type[nn.Module]) -> None:
    model = nn.Sequential(plain)
    fixed = ModuleValidator.fix(model)[0]  # type: ignore[index]
    assert isinstance(fixed, renamed)
    assert are_state_dict_equal(fixed.state_dict(), plain.state_dict())
    x = torch.randn(5, 2, 4 if isinstance(plain, nn.MultiheadAttention) else 3)
    arguments = (x, x, x) if isinstance(plain, nn.MultiheadAttention) else (x,)
    torch.testing.assert_close(fixed(*arguments)[0], plain(*arguments)[0])


def test_a_module_used_twice_is_replaced_twice_by_one() -> None:
    norm = nn.BatchNorm1d(16)
    fixed = ModuleValidator.fix(nn.ModuleDict({"a": norm, "b": norm}))
    assert fixed.get_submodule("a") is fixed.get_submodule("b")


def test_validators_and_fixers_of_ones_own() -> None:
    class Odd(nn.Linear):
        pass

    register_module_validator(Odd)(lambda module: [UnsupportedModuleError("odd")])
    register_module_fixer(Odd)(lambda module, **kwargs: nn.Linear(module.in_features, module.out_features))
    try:
        model = nn.Sequential(Odd(2, 2))
        assert "0: odd" in str(ModuleValidator.validate(model)[0])
        assert type(ModuleValidator.fix(model)[0]) is nn.Linear  # type: ignore[index]
    finally:
        del ModuleValidator.VALIDATORS[Odd], ModuleValidator.FIXERS[Odd]
