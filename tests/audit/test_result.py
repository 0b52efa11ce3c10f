"""A result says what was found, rounded to the safe side, and survives JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from dpdl.audit.result import AuditResult
from dpdl.audit.verdict import A_FAILURE_PROVES_NOTHING
from dpdl.errors import ParameterError


def result(**changes: Any) -> AuditResult:
    given: dict[str, Any] = {"attack": "many runs", "epsilon_lower": 1.239, "delta": 1e-5, "confidence": 0.95}
    return AuditResult(**{**given, **changes})


def test_without_a_contradiction_it_ends_by_saying_that_nothing_is_proven() -> None:
    for claim in (None, 1.239, 2.0, math.inf):
        found = result(claimed_epsilon=claim)
        assert found.consistent
        assert str(found).endswith(A_FAILURE_PROVES_NOTHING)
    assert "epsilon >= 1.23 at delta = 1e-05 with confidence 95%" in str(found)


def test_a_contradiction_is_said_and_shown_however_close() -> None:
    found = result(claimed_epsilon=1.2389)
    assert not found.consistent
    assert A_FAILURE_PROVES_NOTHING not in str(found)
    assert "epsilon >= 1.2390" in str(found)
    assert "above the claim of 1.2389:" in str(found)


@pytest.mark.parametrize(
    ("confidence", "shown"),
    [(0.95, "95%"), (0.999, "99.9%"), (0.9999999, "99.99%"), (2 / 3, "66.66%"), (0.5, "50%")],
)
def test_a_confidence_is_not_shown_as_more_than_it_is(confidence: float, shown: str) -> None:
    assert f"confidence {shown}" in str(result(confidence=confidence))


def test_json_and_back() -> None:
    found = result(
        epsilon_lower=math.inf,
        claimed_epsilon=math.inf,
        details={"n": np.int64(3), "rate": np.float64(0.5), "pair": (1, 2), "most": math.inf},
        assumptions=("a",),
        notes=("b",),
    )
    values = json.loads(found.to_json())
    assert values["schema"] == "dpdl.audit/1"
    assert values["epsilon_lower"] == "inf"
    assert values["details"] == {"n": 3, "rate": 0.5, "pair": [1, 2], "most": "inf"}
    assert values["consistent"] is True
    assert values["summary"] == str(found)
    again = AuditResult.from_json(result(claimed_epsilon=2.0).to_json())
    assert again == result(claimed_epsilon=2.0)
    assert AuditResult.from_json(found.to_json()).epsilon_lower == math.inf


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon_lower": -1.0},
        {"epsilon_lower": math.nan},
        {"epsilon_lower": "1"},
        {"delta": 1.0},
        {"confidence": 1.0},
        {"claimed_epsilon": -0.1},
        {"details": {"scores": np.zeros(3)}},
    ],
)
def test_what_is_no_result_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        result(**changes)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "dpdl.report/1"}', '{"schema": "dpdl.audit/1"}'])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="Not an audit's result"):
        AuditResult.from_json(text)
