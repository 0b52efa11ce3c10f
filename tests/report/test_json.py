"""A report's JSON: what is in it, that it comes back, and that damage and contradiction are refused."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

import accountants
from accountants import EpsilonDelta, Event, Gaussian
from dpdl import Budget, Ledger, PrivacyReport
from dpdl.account import FollowedAccount
from dpdl.errors import ParameterError
from dpdl.ledger_file import LedgerFile
from dpdl.report import report_schema
from tests.report.made import DELTA, RATE, SIGMA, STEP, STEPS, a_report

ADD_OR_REMOVE = accountants.NeighboringRelation.ADD_OR_REMOVE


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def in_a_ledger(**changes: Any) -> PrivacyReport:
    """A run that shares its ledger with a count that somebody else released."""
    ledger = Ledger(relation=ADD_OR_REMOVE)
    ledger.record(Gaussian(30.0), label="count", run="statistics")
    return a_report(account=ledger, other=Gaussian(20.0), taken=100, **changes)


REPORTS: dict[str, Callable[[], PrivacyReport]] = {
    "whole": a_report,
    "half": lambda: a_report(taken=200),
    "nothing yet": lambda: a_report(taken=0),
    "no noise": lambda: a_report(noise_multiplier=0.0),
    "insecure": lambda: a_report(secure=False, notes=("a note",)),
    "in a ledger": in_a_ledger,
}


@functools.cache
def written(name: str) -> tuple[PrivacyReport, str]:
    """A report and its JSON, made once: computing the readings is most of the time that these tests take."""
    report = REPORTS[name]()
    return report, report.to_json()


def document(name: str = "whole") -> dict[str, Any]:
    """Its JSON, to change."""
    values = strict(written(name)[1])
    assert isinstance(values, dict)
    return values


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_comes_back_from_json_as_it_was(name: str) -> None:
    report, text = written(name)
    strict(text)
    assert PrivacyReport.from_json(text) == report


def test_json_of_what_came_back_is_the_same() -> None:
    text = written("half")[1]
    assert PrivacyReport.from_json(text).to_json() == text


@pytest.mark.parametrize("name", REPORTS)
def test_json_follows_the_schema_that_ships_with_the_package(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator(report_schema())
    checker.check_schema(report_schema())
    values = document(name)
    checker.validate(values)
    for damage in ({"epsilon": "none"}, {"delta": 1}, {"steps": 1.5}, {"more": 1}, {"relation": "like"}):
        assert not checker.is_valid({**values, **damage}), damage


def test_the_schema_names_each_field_and_no_other() -> None:
    names = set(document())
    schema = report_schema()
    assert set(schema["required"]) == names
    assert set(schema["properties"]) == names | {"training", "audits"}


def test_every_release_is_listed_with_its_event_and_others_with_their_run() -> None:
    report, values = written("in a ledger")[0], document("in a ledger")

    def listed(releases: list[dict[str, Any]]) -> list[tuple[str, str, int, Event]]:
        return [(r["run"], r["label"], r["count"], Event.from_json(json.dumps(r["event"]))) for r in releases]

    mean = Gaussian(20.0)
    assert listed(values["releases"]) == [("", "mean of the ages", 1, mean), ("", "step", 100, STEP)]
    own = report.run
    assert listed(values["dataset"]["releases"]) == [
        ("statistics", "count", 1, Gaussian(30.0)),
        (own, "mean of the ages", 1, mean),
        (own, "step", 100, STEP),
    ]
    assert values["made"] == report.made
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", values["made"])


def test_the_digest_is_of_the_document_and_not_of_what_others_add() -> None:
    values = document()
    own = {name: value for name, value in values.items() if name != "sha256"}
    told = json.dumps(own, sort_keys=True, separators=(",", ":")).encode()
    assert values["sha256"] == hashlib.sha256(told).hexdigest()
    more = {**values, "training": {"history": []}, "audits": []}
    assert PrivacyReport.from_json(json.dumps(more)) == written("whole")[0]


def test_the_ledger_of_the_data_is_named_with_its_id_and_budget(tmp_path: Any) -> None:
    file = LedgerFile(tmp_path / "patients.ledger", budget=Budget(epsilon=30.0, delta=1e-5))
    dataset = a_report(account=file).dataset
    assert dataset is not None
    assert (dataset.name, dataset.id) == ("the ledger patients.ledger", file.id)
    assert (dataset.budget, dataset.adaptive) == ((30.0, 1e-5), False)


# ── schema 1 ────────────────────────────────────────────────────────────────────────────────────────

OLD: dict[str, Any] = {
    "schema": "dpdl.report/1",
    "claim": "epsilon <= 2.00 at delta = 1e-05, adding or removing one example; 10 of 10 planned steps, Poisson "
    "sampling at rate 0.1, Gaussian noise of 1 times the clipping norm 1 on the sum of per-example gradients. A note.",
    "epsilon": 1.9951,
    "epsilon_lower": 1.995,
    "delta": 1e-05,
    "relation": "adding or removing one example",
    "unit": "example",
    "sampling": "Poisson sampling at rate 0.1",
    "mechanism": "Gaussian noise of 1 times the clipping norm 1 on the sum of per-example gradients",
    "accountant": "PRV",
    "steps": 10,
    "planned_steps": 10,
    "sample_rate": 0.1,
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
    "expected_batch_size": 25.0,
    "secure_randomness": True,
    "assumptions": ["one record is one example"],
    "notes": ["a note"],
    "versions": {"dpdl": "0.1.0"},
    "dataset_epsilon": None,
    "planned_epsilon": 1.9951,
}


def test_schema_1_is_read_and_has_no_readings() -> None:
    report = PrivacyReport.from_json(json.dumps({**OLD, "training": {}}))
    assert (report.epsilon, report.notes, report.releases, report.step) == (1.9951, ("a note",), (), None)
    assert report.readings() is None
    values = strict(report.to_json())
    assert (values["schema"], values["readings"], values["step"]) == ("dpdl.report/2", None, None)
    assert PrivacyReport.from_json(report.to_json()) == report


@pytest.mark.parametrize("change", [{"epsilon": 0.5}, {"claim": "epsilon <= 0.1"}, {"releases": []}, {"steps": 9}])
def test_a_changed_report_of_schema_1_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        PrivacyReport.from_json(json.dumps({**OLD, **change}))


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────


def resealed(values: dict[str, Any]) -> str:
    """The document with the digest and the claim of what it now says: only its contents can give it away."""
    own = {name: value for name, value in values.items() if name not in ("sha256", "training", "audits")}
    told = json.dumps(own, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**own, "sha256": hashlib.sha256(told).hexdigest()})


@pytest.mark.parametrize("name", ["claim", "epsilon", "notes", "readings", "made", "releases", "steps", "versions"])
def test_any_edit_breaks_the_digest(name: str) -> None:
    values = document()
    values[name] = {"claim": "fine", "notes": ["fine"], "made": "2020-01-01"}.get(name, 0)
    with pytest.raises(ParameterError, match="digest"):
        PrivacyReport.from_json(json.dumps(values))


def test_numbers_that_the_claim_does_not_say_are_refused_under_a_new_digest() -> None:
    values = document()
    values["epsilon"] = 4.0
    with pytest.raises(ParameterError, match="claim and its numbers differ"):
        PrivacyReport.from_json(resealed(values))


def test_an_epsilon_below_what_its_own_releases_spend_is_refused() -> None:
    """Even with a claim and a digest that fit: the accountants know better."""
    report = written("whole")[0]
    lie = dataclasses.replace(report, epsilon=1.0, epsilon_lower=0.0)
    values = {**document(), "epsilon": 1.0, "epsilon_lower": 0.0, "claim": str(lie)}
    with pytest.raises(ParameterError, match="the releases it lists spend at least"):
        PrivacyReport.from_json(resealed(values))
    more = document("in a ledger")
    with pytest.raises(ParameterError, match="dataset_epsilon is"):
        PrivacyReport.from_json(resealed({**more, "dataset_epsilon": more["dataset_epsilon"] / 2}))


@pytest.mark.parametrize("name", ["half", "nothing yet"])
def test_a_planned_epsilon_below_what_all_steps_will_spend_is_refused(name: str) -> None:
    report, values = written(name)[0], document(name)
    assert report.planned_epsilon is not None
    lie = {**values, "planned_epsilon": max(report.epsilon, 0.999 * report.planned_epsilon)}
    with pytest.raises(ParameterError, match="planned_epsilon is"):
        PrivacyReport.from_json(resealed(lie))


def test_rounding_of_another_machine_is_no_contradiction() -> None:
    values = document("half")
    said = {name: values[name] * (1 - 1e-12) for name in ("epsilon_lower", "planned_epsilon")}
    assert PrivacyReport.from_json(resealed({**values, **said})).planned_epsilon == said["planned_epsilon"]


def test_a_lower_bound_above_what_can_have_been_spent_is_refused() -> None:
    report = dataclasses.replace(written("whole")[0], epsilon=5.0, epsilon_lower=4.9, planned_epsilon=5.0)
    values = {**document(), "epsilon": 5.0, "epsilon_lower": 4.9, "planned_epsilon": 5.0, "claim": str(report)}
    with pytest.raises(ParameterError, match="spend at most"):
        PrivacyReport.from_json(resealed(values))


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_ledger_of_the_data_without_the_runs_own_releases_is_refused(adaptive: bool) -> None:
    budget = {"epsilon": 0.1, "delta": DELTA, "adaptive": True} if adaptive else None
    dataset: dict[str, Any] = {"name": "the ledger", "id": None, "budget": budget, "releases": []}
    values = {**document(), "dataset": dataset, "dataset_epsilon": 0.1 if adaptive else 0.0}
    with pytest.raises(ParameterError, match=re.escape("the run made 480 releases of")):
        PrivacyReport.from_json(resealed(values))


def test_an_adaptive_budget_that_its_releases_pass_is_refused() -> None:
    values = document("in a ledger")
    dataset = {**values["dataset"], "budget": {"epsilon": 0.1, "delta": DELTA, "adaptive": True}}
    small = {**values, "dataset": dataset, "dataset_epsilon": 0.1, "readings": None}
    with pytest.raises(ParameterError, match=r"the adaptive budget is 0\.1"):
        PrivacyReport.from_json(resealed(small))
    dataset["budget"]["epsilon"], dataset["budget"]["delta"] = 9.0, 2 * DELTA
    with pytest.raises(ParameterError, match="from its delta on"):
        PrivacyReport.from_json(resealed({**small, "dataset_epsilon": 9.0}))


def changed_at(values: dict[str, Any], path: tuple[str | int, ...], new: Any) -> dict[str, Any]:
    """A copy with one reading changed; `new` may be a function of the old one."""
    copy = json.loads(json.dumps(values))
    at = copy["readings"]
    for each in path[:-1]:
        at = at[each]
    at[path[-1]] = new(at[path[-1]]) if callable(new) else new
    return dict(copy)


def nine_tenths(value: float) -> float:
    return 0.9 * value


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (("at_deltas", 3, "so_far"), nine_tenths),
        (("at_deltas", 3, "planned"), nine_tenths),
        (("at_deltas", 3, "all_runs"), nine_tenths),
        (("at_deltas", 3, "so_far"), "much"),
        (("at_deltas", 3, "delta"), 2.0),
        (("at_deltas",), []),
        (("at_deltas",), 5),
        (("over_steps", 20, "epsilon"), nine_tenths),
        (("over_steps", 20, "step"), 3),
        (("over_steps", -1, "planned"), False),
        (("over_steps",), {}),
        (("trade_off", "beta", 40), lambda beta: beta + 0.05),
        (("trade_off", "alpha", 40), nine_tenths),
        (("membership", "advantage"), nine_tenths),
        (("membership", "accuracy"), nine_tenths),
        (("membership", "true_positive_rates", 1, 1), nine_tenths),
        (("membership", "true_positive_rates", 1, 0), nine_tenths),
        (("membership", "posteriors", 0, 1), nine_tenths),
        (("membership", "failure"), 1e-9),
        (("dataset_membership", "advantage"), nine_tenths),
        (("membership",), {"advantage": 0.1}),
    ],
)
def test_readings_better_than_what_follows_from_the_releases_are_refused(path: tuple[str | int, ...], new: Any) -> None:
    of_all = {"all_runs", "dataset_membership"} & set(path)
    values = changed_at(document("in a ledger" if of_all else "half"), path, new)
    if path == ("at_deltas",) and new == []:
        assert PrivacyReport.from_json(resealed(values))  # says less, and nothing that is wrong
        return
    with pytest.raises(ParameterError, match="reading"):
        PrivacyReport.from_json(resealed(values))


@pytest.mark.parametrize("readings", [{"x": 1}, [], 5, "none", {"at_deltas": []}])
def test_readings_of_another_form_are_refused(readings: object) -> None:
    with pytest.raises(ParameterError, match="readings must be"):
        PrivacyReport.from_json(resealed({**document(), "readings": readings}))


def test_readings_that_promise_less_are_read() -> None:
    values = changed_at(document("half"), ("membership", "advantage"), 0.999)
    assert PrivacyReport.from_json(resealed(values)) == written("half")[0]
    assert PrivacyReport.from_json(resealed({**values, "readings": None})) == written("half")[0]


def test_readings_at_more_deltas_are_read() -> None:
    report = written("half")[0]
    assert PrivacyReport.from_json(json.dumps(report.to_dict(deltas=[3e-6]))) == report


def test_the_ledger_of_the_data_lists_the_runs_own_releases_before_they_are_written_there(tmp_path: Any) -> None:
    """A rank that only reads the dataset's ledger may be ahead of the one that writes it."""
    file = LedgerFile(tmp_path / "patients.ledger")
    file.record(Gaussian(30.0), label="count", run="statistics", branch=None, number=None, ahead=1)
    report = a_report(account=FollowedAccount(file), taken=100)
    assert report.dataset is not None
    assert [(each.run, each.count) for each in report.dataset.releases] == [("statistics", 1), (report.run, 100)]
    assert report.dataset_epsilon is not None
    assert report.dataset_epsilon > report.epsilon
    assert PrivacyReport.from_json(report.to_json()) == report


CONTRADICTIONS: dict[str, Callable[[PrivacyReport], dict[str, Any]]] = {
    "480 steps are more than the 479": lambda report: {"planned_steps": STEPS - 1},
    "it lists 480 steps": lambda report: {"steps": STEPS - 1},
    "sample_rate and noise_multiplier are": lambda report: {"noise_multiplier": SIGMA + 1},
    "sample_rate and noise": lambda report: {"sample_rate": RATE / 2},
    "epsilon_lower .* is above": lambda report: {"epsilon_lower": report.epsilon + 1},
    "planned_epsilon .* is below": lambda report: {"planned_epsilon": 0.1},
    "it lists releases and no step": lambda report: {"step": None},
    "one without the other": lambda report: {"dataset_epsilon": 4.0},
}


@pytest.mark.parametrize("says", CONTRADICTIONS)
def test_a_report_that_contradicts_itself_is_refused(says: str) -> None:
    values = {**document(), **CONTRADICTIONS[says](written("whole")[0])}
    with pytest.raises(ParameterError, match=says):
        PrivacyReport.from_json(resealed(values))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", -1.0),
        ("epsilon", None),
        ("epsilon", "much"),
        ("epsilon", True),
        ("delta", 0.0),
        ("delta", 1.0),
        ("delta", "inf"),
        ("steps", -1),
        ("steps", 1.0),
        ("sample_rate", 0.0),
        ("sample_rate", 2.0),
        ("relation", "adding a friend"),
        ("unit", ""),
        ("secure_randomness", 1),
        ("assumptions", "none"),
        ("notes", [""]),
        ("notes", [1]),
        ("versions", {"torch": 2}),
        ("made", "yesterday"),
        ("step", {"kind": "gaussian"}),
        ("releases", {}),
        ("releases", [{"run": "", "label": "step", "count": 0, "event": json.loads(STEP.to_json())}]),
        ("releases", [{"run": "", "label": "step", "count": 480}]),
        ("dataset", []),
        ("dataset", {"name": "x", "id": None, "budget": {"epsilon": -1}, "releases": []}),
    ],
)
def test_a_field_of_another_kind_is_refused(name: str, value: object) -> None:
    values = document()
    values[name] = value
    with pytest.raises(ParameterError):
        PrivacyReport.from_json(resealed(values))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '{"schema": 2}', '{"schema": "dpdl.report/3"}', '{"a": NaN}', "[" * 100_000]
)
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="Not a privacy report"):
        PrivacyReport.from_json(text)


def test_a_missing_field_is_named() -> None:
    values = document()
    del values["unit"]
    with pytest.raises(ParameterError, match=re.escape("missing fields ['unit']")):
        PrivacyReport.from_json(resealed(values))


# ── adaptive budgets ────────────────────────────────────────────────────────────────────────────────


def test_under_an_adaptive_budget_the_claim_of_all_runs_is_the_budget() -> None:
    ledger = Ledger(relation=ADD_OR_REMOVE, budget=Budget(epsilon=9.0, delta=1e-6, adaptive=True))
    report = a_report(account=ledger)
    assert report.dataset_epsilon == 9.0
    read = report.readings()
    assert read is not None
    assert {row.delta: row.all_runs for row in read.at_deltas if row.delta in (1e-3, 1e-6, 1e-7)} == {
        1e-3: 9.0,
        1e-6: 9.0,
        1e-7: math.inf,
    }
    assert read.dataset_membership is not None
    by_the_budget = accountants.tpr_at_fpr(EpsilonDelta(9.0, 1e-6), [1e-3, 1e-2, 1e-1]).tolist()
    assert [rate for _, rate in read.dataset_membership.true_positive_rates] == by_the_budget
    values = strict(report.to_json())
    assert PrivacyReport.from_json(json.dumps(values)) == report
    with pytest.raises(ParameterError, match="adaptive budget"):
        PrivacyReport.from_json(resealed({**values, "dataset_epsilon": 5.0}))


def test_the_report_is_made_without_computing_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpdl.privacy_report.readings", lambda *_, **__: pytest.fail("a curve was computed"))
    report = in_a_ledger()
    assert str(report).startswith("epsilon <=")
    assert report.delta == DELTA
