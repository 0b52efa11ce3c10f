"""A result says what was found, rounded to the safe side, and survives JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

import dpdl
from accountants import NeighboringRelation
from dpdl.audit.coin_game import CoinGame
from dpdl.audit.curves import CurveName, PlanCurves
from dpdl.audit.many_runs import bound_from_runs
from dpdl.audit.one_run import bound_from_scores
from dpdl.audit.result import AuditResult
from dpdl.audit.verdict import A_FAILURE_PROVES_NOTHING
from dpdl.errors import ParameterError
from dpdl.plan import PrivacyPlan
from dpdl.privacy_report import rounded_up


def result(**changes: Any) -> AuditResult:
    given: dict[str, Any] = {
        "attack": "many runs",
        "epsilon_lower": 1.239,
        "delta": 1e-5,
        "relation": "add_or_remove",
        "confidence": 0.95,
    }
    return AuditResult(**{**given, **changes})


def test_a_claim_whose_curve_is_refuted_is_contradicted_whatever_the_figure() -> None:
    found = result(claimed_epsilon=1.239, claim_refuted=True)
    assert not found.consistent
    assert A_FAILURE_PROVES_NOTHING not in str(found)
    assert "the curve of the claim of 1.24 is refuted: the claim is contradicted" in str(found)
    assert AuditResult.from_json(found.to_json()) == found


def test_the_relation_is_kept_as_the_accountants_name_it() -> None:
    for relation in NeighboringRelation:
        assert result(relation=relation).relation == relation.value
        assert AuditResult.from_json(result(relation=relation).to_json()).relation == relation.value


def test_a_result_of_schema_1_is_read_with_an_unknown_relation() -> None:
    values = result(claimed_epsilon=2.0).to_dict()
    old = {name: value for name, value in values.items() if name not in ("relation", "claim_refuted")}
    assert AuditResult.from_dict({**old, "schema": "dpdl.audit/1"}) == result(claimed_epsilon=2.0, relation=None)
    with pytest.raises(ParameterError, match="missing fields"):
        AuditResult.from_dict(old)


@pytest.mark.parametrize(
    "change",
    [
        {"attack": 5},
        {"details": 5},
        {"assumptions": 5},
        {"assumptions": [None]},
        {"notes": [1]},
        {"epsilon_lower": 10**400},
        {"epsilon_lower": "nan"},
        {"confidence": None},
        {"schema": []},
    ],
)
def test_a_damaged_result_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        AuditResult.from_json(json.dumps({**result().to_dict(), **change}))


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
    [(0.95, "95%"), (1 - 1e-13, "99.99%"), (0.999, "99.9%"), (0.9999999, "99.99%"), (2 / 3, "66.66%"), (0.5, "50%")],
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
    assert values["schema"] == "dpdl.audit/2"
    assert values["relation"] == "add_or_remove"
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
        {"details": 5},
        {"attack": 5},
        {"assumptions": 5},
        {"assumptions": "one"},
        {"assumptions": [None]},
        {"notes": [1]},
        {"epsilon_lower": 10**400},
        {"epsilon_lower": None},
        {"delta": None},
        {"confidence": None},
        {"relation": "add/remove"},
        {"relation": 3},
        {"relation": []},
        {"claim_refuted": 1},
        {"claim_refuted": True},
    ],
)
def test_what_is_no_result_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        result(**changes)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"schema": "dpdl.report/1"}', '{"schema": "dpdl.audit/1"}'])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="Not an audit's result"):
        AuditResult.from_json(text)


# ── what audits write ───────────────────────────────────────────────────────────────────────────────

PLAN = dpdl.PrivacyPlan(sample_rate=1.0, expected_batch_size=1, steps=4, noise_multiplier=1.0, max_grad_norm=1.0)
SCORES = {"score": np.arange(40.0)}
COINS = np.arange(40) % 2 == 0


@pytest.mark.parametrize("relation", NeighboringRelation)
def test_every_audit_says_what_its_neighbours_differ_in(relation: NeighboringRelation) -> None:
    plan = dataclasses.replace(PLAN, relation=relation.value)
    level: dict[str, Any] = {"delta": 1e-5, "confidence": 0.9}
    cases: list[tuple[PrivacyPlan | CurveName, NeighboringRelation | None, NeighboringRelation]] = [
        ("any", None, NeighboringRelation.ADD_OR_REMOVE),
        (plan, None, relation),
        ("any", relation, relation),
    ]
    for curve, given, expected in cases:
        runs = bound_from_runs(SCORES, SCORES, curve=curve, relation=given, **level)
        one = bound_from_scores(SCORES, COINS, attack="one run", curve=curve, relation=given, **level)
        assert runs.relation == one.relation == expected.value
    game = CoinGame(scores=SCORES["score"], coins=COINS, relation=relation)
    assert game.audit(attack="a game", **level).relation == relation.value
    assert game.audit(attack="a game", curve=PLAN, **level).relation == relation.value


def test_a_claim_of_which_exactly_the_curve_is_refuted_does_not_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure is then the claim's own, rounded down, and passes nothing."""
    delta, scores = 1e-5, SCORES
    claim = PLAN.epsilon(delta)
    strength = 1 / PLAN.noise_multiplier
    monkeypatch.setattr(PlanCurves, "strongest", lambda *_, **__: strength)

    def audits(claimed: float | None) -> list[AuditResult]:
        level: dict[str, Any] = {"delta": delta, "confidence": 0.9, "claimed_epsilon": claimed, "curve": PLAN}
        right = np.arange(40) >= 20  # the highest scores were in: enough for the attack to be counted at all
        return [
            bound_from_runs(scores, scores, **level),
            bound_from_scores(scores, right, attack="one run", **level),
        ]

    for found in (*audits(claim), *audits(float(rounded_up(claim)))):
        assert found.claimed_epsilon is not None
        assert found.epsilon_lower <= found.claimed_epsilon
        assert not found.consistent
    assert all(found.consistent for found in (*audits(None), *audits(2 * claim)))  # no claim, or not the plan's
    strength = 0.999 / PLAN.noise_multiplier
    assert all(found.consistent for found in audits(claim))
