"""Every engine on every adapter of PEFT: exact, or refused with a reason."""

from __future__ import annotations

import pytest

from tests.zoo import adapters
from tests.zoo.claims import assert_exact, assert_exact_or_refused, parameters_of
from tests.zoo.model import ZooModel

pytest.importorskip("peft")

MODELS = parameters_of(adapters.MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_auto_is_exact_on_peft(model: ZooModel) -> None:
    assert_exact(model, engine="auto")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["tape", "vmap"])
@pytest.mark.parametrize("model", MODELS)
def test_an_engine_is_exact_on_peft_or_refuses(model: ZooModel, engine: str) -> None:
    assert_exact_or_refused(model, engine=engine)
