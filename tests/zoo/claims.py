"""What is asserted of an engine on a model of the zoo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.zoo.model import ZooModel
from tests.zoo.outcome import outcome_of, truth_of

# Above this relative difference between an example's output alone and in a batch, it is no longer rounding.
BATCH_EFFECT = 1e-9


def parameters_of(models: tuple[ZooModel, ...]) -> list[Any]:
    """One test parameter a model; all but the representatives are slow."""
    return [pytest.param(model, id=model.name, marks=() if model.default else pytest.mark.slow) for model in models]


def assert_exact(model: ZooModel, *, engine: str) -> None:
    """Exact in float64 and in float32; a model that is meant to be refused is refused, for the stated reason."""
    truth = truth_of(model)
    if model.refused:
        outcome = outcome_of(model, truth, engine=engine)
        assert outcome.verdict == "refused", outcome
        assert model.refused in outcome.reason
        return
    assert truth.batch_effect <= BATCH_EFFECT, "the truth is ambiguous: a batch of N is not N batches of one"
    for dtype in (torch.float64, torch.float32):
        rounded = truth if dtype == torch.float64 else truth_of(model, dtype)
        outcome = outcome_of(model, rounded, engine=engine, dtype=dtype)
        assert outcome.verdict == "exact", outcome


def assert_exact_or_refused(model: ZooModel, *, engine: str) -> None:
    """An engine that is asked for by name may refuse, but is never wrong."""
    outcome = outcome_of(model, truth_of(model), engine=engine)
    assert outcome.verdict in ("exact", "refused"), outcome
