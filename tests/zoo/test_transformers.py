"""Every engine on every architecture of transformers: exact, or refused with a reason."""

from __future__ import annotations

import pytest

from tests.zoo import audio_and_series, decoders, encoder_decoders, encoders, mixtures, multimodal, state_space, vision
from tests.zoo.claims import assert_exact, assert_exact_or_refused, parameters_of
from tests.zoo.model import ZooModel

pytest.importorskip("transformers")

MODELS = parameters_of(
    (
        *encoders.MODELS,
        *decoders.MODELS,
        *mixtures.MODELS,
        *state_space.MODELS,
        *encoder_decoders.MODELS,
        *vision.MODELS,
        *multimodal.MODELS,
        *audio_and_series.MODELS,
    )
)


@pytest.mark.parametrize("model", MODELS)
def test_auto_is_exact_on_transformers(model: ZooModel) -> None:
    assert_exact(model, engine="auto")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["tape", "vmap"])
@pytest.mark.parametrize("model", MODELS)
def test_an_engine_is_exact_on_transformers_or_refuses(model: ZooModel, engine: str) -> None:
    assert_exact_or_refused(model, engine=engine)
