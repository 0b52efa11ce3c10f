"""All small models, in one list, and which engine has to take which."""

from __future__ import annotations

from tests.per_sample.case import ENGINES, SmallModel
from tests.per_sample.families import (
    attention,
    calling,
    convolution,
    dense,
    normalisation,
    parameters,
    sequence,
)

SMALL_MODELS: tuple[SmallModel, ...] = (
    *dense.MODELS,
    *convolution.MODELS,
    *normalisation.MODELS,
    *sequence.MODELS,
    *attention.MODELS,
    *parameters.MODELS,
    *calling.MODELS,
)

BY_NAME: dict[str, SmallModel] = {model.name: model for model in SMALL_MODELS}

TAKEN: tuple[tuple[str, SmallModel], ...] = tuple(
    (engine, case) for engine in ENGINES for case in SMALL_MODELS if engine in case.must_take
)


def name_of(value: str | SmallModel) -> str:
    """For test ids."""
    return value if isinstance(value, str) else value.name
