"""`dpdl.fix` on timm's networks, most of which have batch normalisation: clean afterwards, and privately trained."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from dpdl.validation import FrozenBatchNorm, fix, fix_report
from tests.zoo.pytorch_image_models import library

if importlib.util.find_spec("timm") is None:  # not imported: that takes a stand-in for torchvision
    pytest.skip("timm is not installed", allow_module_level=True)

EXAMPLES = 4
NETWORKS = {
    "resnet10t": 32,
    "mobilenetv3_small_050": 32,  # with an activation inside of its normalisations
}
MORE_NETWORKS = {
    "resnet18": 32,
    "mobilenetv2_050": 32,
    "regnetx_002": 32,
    "efficientnet_b0": 32,
    "densenet121": 32,
    "ghostnet_050": 32,
    "skresnet18": 32,
}


def network(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: nn.Module = library().create_model(name, num_classes=3)
    return model


def images(size: int) -> torch.Tensor:
    return torch.randn(EXAMPLES, 3, size, size, generator=torch.Generator().manual_seed(2))


def train_privately(model: nn.Module, x: torch.Tensor) -> str | None:
    """One private step with the user's three lines; the engine that it took."""
    loader = DataLoader(TensorDataset(x, torch.arange(len(x)) % 3), batch_size=len(x))
    plan = dpdl.PrivacyPlan.for_loader(loader, steps=1, noise_multiplier=1.0, max_grad_norm=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = dpdl.make_private(model, optimizer, loader, plan)
    for images_, classes in private.loader:
        private.optimizer.zero_grad()
        F.cross_entropy(private.model(images_), classes).backward()
        private.optimizer.step()
    assert private.optimizer.steps_taken == 1
    return private.model.engine_name


def assert_repaired(name: str, size: int) -> None:
    x = images(size)
    model = network(name)
    assert not dpdl.check(model, x)
    fixed = fix(model, x)
    assert fix_report(fixed).remaining == ()
    assert dpdl.check(fixed, x)
    assert train_privately(fixed, x) == "tape"


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fixed_network_is_clean_and_trains_privately(name: str) -> None:
    assert_repaired(name, NETWORKS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_NETWORKS)
def test_more_fixed_networks_are_clean_and_train_privately(name: str) -> None:
    assert_repaired(name, MORE_NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pretrained_network_computes_the_same_with_frozen_statistics(name: str) -> None:
    model = network(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = images(NETWORKS[name])
    expected = model.eval()(x)
    fixed = fix(model.train(), x, batch_norm="frozen")
    assert torch.equal(fixed.eval()(x), expected)
    assert any(isinstance(module, FrozenBatchNorm) for module in fixed.modules())
    folded = fix(model.requires_grad_(False), x, batch_norm="frozen", fold=True)
    # What may stay is what does not follow a convolution.
    assert sum(isinstance(module, FrozenBatchNorm) for module in folded.modules()) == 0
    assert fix_report(folded).change.eval.relative < 1e-4
