"""Snooper and surgeon: what they find, what they change, and deepee's defects D8 and D9."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from dpdl.compat.deepee import ModelSnooper, ModelSurgeon, PrivacyWrapper, SurgicalProcedures
from dpdl.compat.deepee.snooper import BadModuleError, BN_running_stats_off, IN_running_stats_off, Validator
from dpdl.compat.deepee.surgery import replace_all_modules
from dpdl.errors import ParameterError


def network(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 48, 3), norm, nn.ReLU(), nn.Sequential(nn.Conv2d(48, 48, 3), nn.Flatten()))


def learned(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn_like(p))
    return norm


BN = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]
IN = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d]


@pytest.mark.parametrize("kind", [*BN, *IN])
def test_running_statistics_are_found_by_name_and_only_they(kind: type[nn.Module]) -> None:
    model = network(nn.Identity())
    model[3].add_module("norm", kind(4, track_running_stats=True))
    with pytest.raises(BadModuleError, match=f"'3.norm' \\({kind.__name__}\\)"):
        ModelSnooper().snoop(model)
    ModelSnooper().snoop(network(kind(4, track_running_stats=False)))


def test_validators_return_their_message_and_the_snooper_takes_more_of_them() -> None:
    no_relu = Validator("no relu", lambda m: not any(isinstance(c, nn.ReLU) for c in m.modules()), "ReLU found. ")
    assert no_relu.validate(nn.Linear(1, 1)) == ""
    snooper = ModelSnooper()
    snooper.validators.append(no_relu)
    with pytest.raises(BadModuleError, match=r"BatchNorm layers.*ReLU found"):
        snooper.snoop(network(nn.BatchNorm2d(48)))
    assert BN_running_stats_off(network(nn.GroupNorm(4, 48)))
    assert IN_running_stats_off(network(nn.BatchNorm2d(48)))


def test_batch_norm_that_is_two_models_is_refused_when_it_is_wrapped() -> None:  # D9
    with pytest.raises(BadModuleError, match="BN_to_BN_nostats"):
        PrivacyWrapper(network(nn.BatchNorm2d(48, track_running_stats=False)), 2, 1.0, 1.0)


@pytest.mark.parametrize(
    "procedure",
    [
        SurgicalProcedures.BN_to_IN,
        SurgicalProcedures.BN_to_BN_nostats,
        SurgicalProcedures.BN_to_GN,
        partial(SurgicalProcedures.BN_to_GN, num_groups=12),
        partial(SurgicalProcedures.BN_to_LN, normalized_shape=(48, 6, 6)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_converted_models_train_and_are_the_same_in_eval_mode(procedure: object, dtype: torch.dtype) -> None:  # D8, D9
    model = network(learned(nn.BatchNorm2d(48))).to(dtype)
    scale = model[1].weight
    converted = ModelSurgeon(procedure).operate(model)  # type: ignore[arg-type]
    assert converted is model
    assert torch.equal(model[1].weight.flatten()[:1], scale[:1])
    assert model[1].weight.dtype is dtype
    wrapped = PrivacyWrapper(model, 2, 1.0, 1.0)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    trained = wrapped(x)
    wrapped.eval()
    assert torch.allclose(trained, wrapped(x), atol=1e-5)
    assert torch.allclose(wrapped(x)[:1], wrapped(x[:1]), atol=1e-5)


def test_groups_divide_the_channels_or_are_refused_leaving_all_as_it_was() -> None:  # D8
    model = network(nn.BatchNorm2d(48))
    for groups in (96, 5, "many", 2.0, True):
        with pytest.raises(ValueError, match="num_groups"):
            ModelSurgeon(partial(SurgicalProcedures.BN_to_GN, num_groups=groups)).operate(model)
        assert isinstance(model[1], nn.BatchNorm2d)
    assert ModelSurgeon(SurgicalProcedures.BN_to_GN).operate(model)[1].num_groups == 24  # type: ignore[index, union-attr]
    assert SurgicalProcedures.BN_to_GN(nn.BatchNorm2d(64)).num_groups == 32


@pytest.mark.parametrize("kind", IN)
def test_instance_norms_lose_their_statistics(kind: type[nn.Module]) -> None:  # D8: deepee leaves them as they are
    norm = learned(kind(4, affine=True, track_running_stats=True))
    model = nn.Sequential(norm, nn.BatchNorm2d(4))
    ModelSurgeon(SurgicalProcedures.IN_to_IN_nostats).operate(model)
    assert isinstance(model[0], kind)
    assert not model[0].track_running_stats
    assert torch.equal(model[0].weight, norm.weight)
    assert isinstance(model[1], nn.BatchNorm2d)


def test_sync_batch_norm_is_converted() -> None:  # D8
    for procedure in (SurgicalProcedures.BN_to_IN, SurgicalProcedures.BN_to_GN, SurgicalProcedures.BN_to_BN_nostats):
        model = ModelSurgeon(procedure).operate(network(nn.SyncBatchNorm(48)))
        PrivacyWrapper(model, 2, 1.0, 1.0)(torch.randn(2, 3, 8, 8))


def test_one_module_in_two_places_stays_one_and_the_model_itself_may_be_it() -> None:
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(norm, nn.ReLU(), norm)
    ModelSurgeon(SurgicalProcedures.BN_to_GN).operate(model)
    assert model[0] is model[2]
    assert isinstance(ModelSurgeon(SurgicalProcedures.BN_to_IN).operate(nn.BatchNorm2d(4)), nn.InstanceNorm2d)


def test_a_converter_of_ones_own() -> None:
    model = replace_all_modules(network(nn.BatchNorm2d(48)), nn.ReLU, lambda _: nn.Tanh())
    assert isinstance(model[2], nn.Tanh)  # type: ignore[index]
    with pytest.raises(ParameterError, match="converter"):
        ModelSurgeon("BN_to_GN")  # type: ignore[arg-type]


def test_images_too_small_for_instance_norm_are_an_error_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"typical of .*BatchNorm.*GroupNorm"):
        PrivacyWrapper(network(nn.InstanceNorm2d(48)), 2, 1.0, 1.0)(torch.randn(2, 3, 3, 3))
