"""Every engine on every family of timm: exact, or refused with a reason."""

from __future__ import annotations

import importlib.util

import pytest

from tests.zoo import pytorch_image_models
from tests.zoo.claims import assert_exact, assert_exact_or_refused, parameters_of
from tests.zoo.model import ZooModel

if importlib.util.find_spec("timm") is None:  # not imported: that takes a stand-in for torchvision
    pytest.skip("timm is not installed", allow_module_level=True)

MODELS = parameters_of(pytorch_image_models.MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_auto_is_exact_on_timm(model: ZooModel) -> None:
    assert_exact(model, engine="auto")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["tape", "vmap"])
@pytest.mark.parametrize("model", MODELS)
def test_an_engine_is_exact_on_timm_or_refuses(model: ZooModel, engine: str) -> None:
    assert_exact_or_refused(model, engine=engine)
