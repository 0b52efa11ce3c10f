"""A report's JSON, read: every field of its kind, and none of them contradicting another.

What stands in a file was written by somebody else, or long ago. It is refused where it

- is not what `to_json` wrote: another schema, a field missing or unknown, of another kind, or out of range;
- was changed: the digest is not that of the document (schema 2), or the claim is not that of the numbers;
- cannot be true: epsilon, so far, after all planned steps or of all runs on the data, is below what the listed releases
  certainly spend, or what it says that they mean is better than what follows from them. That is asked of the
  accountants' certified lower bounds, and of curves with a margin, so that a later version, which may prove a smaller
  epsilon, still reads what an earlier one wrote.

The digest has no key: it finds accidents and careless edits, not someone who writes the whole report anew.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from accountants import Composed, Event, Gaussian, Interval, NeighboringRelation, PoissonSampled, PRVAccountant
from dpdl.errors import ParameterError
from dpdl.readings import Spent, readings
from dpdl.releases import TRAINING_STEP, DatasetRecord, Release, counted

__all__ = ["SCHEMA", "digest_of", "report_values"]

SCHEMA = "dpdl.report/2"
SCHEMA_1 = "dpdl.report/1"  # without the releases, and what follows from them
BESIDE_THE_REPORT = ("training", "audits")  # what others may add to the document; its digest does not cover them
SINCE_2 = frozenset({"made", "run", "step", "releases", "dataset"})
REMEDY = "Give what PrivacyReport.to_json, or dpdl train, wrote."
_ROUNDING = 1e-9  # relative: of another machine's libraries
_MARGIN = 0.01  # by which what follows from the releases may be better than what this version proves
_MOST_DELTAS = 1000  # that readings are checked at: each is computed
_POINTS = frozenset({"delta", "step", "alpha", "failure"})  # where a reading is taken; all else is a bound
_PAIRS = frozenset({"true_positive_rates", "posteriors"})
_RELATIONS = {relation.phrase: relation for relation in NeighboringRelation}


def digest_of(document: dict[str, Any]) -> str:
    """SHA-256 of a report's own part of a document, written with sorted keys and without spaces."""
    own = {name: value for name, value in document.items() if name not in {"sha256", *BESIDE_THE_REPORT}}
    return hashlib.sha256(json.dumps(own, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def report_values(text: str, names: set[str]) -> tuple[dict[str, Any], str]:
    """The arguments for a report, checked, and the claim that the document makes.

    Args:
        text: what `PrivacyReport.to_json` wrote.
        names: of all arguments.

    Raises:
        ParameterError: as at the head of this module.
    """
    document = _document(text)
    schema = document["schema"]
    if schema not in (SCHEMA_1, SCHEMA):
        raise ParameterError(f"Not a privacy report: schema {schema!r}, expected {SCHEMA!r} or {SCHEMA_1!r}. {REMEDY}")
    wanted = names - (SINCE_2 if schema == SCHEMA_1 else frozenset())
    around = {"schema", "claim", *([] if schema == SCHEMA_1 else ["readings", "sha256"])}
    own = set(document) - set(BESIDE_THE_REPORT)
    if own != wanted | around:
        missing, unknown = sorted((wanted | around) - own), sorted(own - wanted - around)
        raise ParameterError(f"Not a privacy report: missing fields {missing}, unknown fields {unknown}. {REMEDY}")
    if schema == SCHEMA and document["sha256"] != digest_of(document):
        raise ParameterError(
            "The report's digest is not that of what it says: it was changed or damaged after it was made. Ask whoever "
            "made it for another."
        )
    values = {name: _READ[name](name, document[name]) for name in wanted}
    _refuse_contradictions(values)
    if schema == SCHEMA:
        _refuse_better_readings(document["readings"], values)
    return values, document["claim"]


def _document(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, TypeError, RecursionError) as error:
        raise ParameterError(f"Not a privacy report: not JSON ({error}). {REMEDY}") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise ParameterError(f"Not a privacy report: no object with a schema. {REMEDY}")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# ── fields ──────────────────────────────────────────────────────────────────────────────────────────


def _wrong(name: str, value: object, wanted: str) -> ParameterError:
    return ParameterError(f"Not a privacy report: {name} must be {wanted}, got {value!r}. {REMEDY}")


def _number(name: str, value: object) -> float:
    if value == "inf":
        return math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(name, value, "a number")
    return float(value)


def _at_least_zero(name: str, value: object) -> float:
    number = _number(name, value)
    if not number >= 0:
        raise _wrong(name, value, ">= 0")
    return number


def _count(name: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise _wrong(name, value, "a whole number >= 0")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "a text")
    return value


def _texts(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _wrong(name, value, "a list of texts")
    return tuple(_filled(name, each) for each in value)


def _filled(name: str, value: object) -> str:
    text = _text(name, value)
    if not text:
        raise _wrong(name, value, "a text that says something")
    return text


def _delta(name: str, value: object) -> float:
    number = _number(name, value)
    if not 0 < number < 1:
        raise _wrong(name, value, "in (0, 1)")
    return number


def _rate(name: str, value: object) -> float:
    number = _number(name, value)
    if not 0 < number <= 1:
        raise _wrong(name, value, "in (0, 1]")
    return number


def _relation(name: str, value: object) -> str:
    if value not in _RELATIONS:
        raise _wrong(name, value, f"one of {list(_RELATIONS)}")
    return _text(name, value)


def _flag(name: str, value: object) -> bool:
    if type(value) is not bool:
        raise _wrong(name, value, "true or false")
    return value


def _versions(name: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object of texts")
    return {key: _text(name, each) for key, each in value.items()}


def _day(name: str, value: object) -> str:
    try:
        return datetime.date.fromisoformat(_text(name, value)).isoformat()
    except ValueError as error:
        raise _wrong(name, value, "a day such as 2026-05-03") from error


def _event(name: str, value: object) -> Event:
    return Event.from_json(json.dumps(value))


def _releases(name: str, value: object) -> tuple[Release, ...]:
    if not isinstance(value, list):
        raise _wrong(name, value, "a list of releases")
    return tuple(Release.from_dict(each) for each in value)


def _dataset(name: str, value: object) -> DatasetRecord:
    return DatasetRecord.from_dict(value)


def _or_none(read: Callable[[str, object], Any]) -> Callable[[str, object], Any]:
    return lambda name, value: None if value is None else read(name, value)


_READ: dict[str, Callable[[str, object], Any]] = {
    "epsilon": _at_least_zero,
    "epsilon_lower": _at_least_zero,
    "delta": _delta,
    "relation": _relation,
    "unit": _filled,
    "sampling": _filled,
    "mechanism": _filled,
    "accountant": _filled,
    "steps": _count,
    "planned_steps": _count,
    "sample_rate": _rate,
    "noise_multiplier": _at_least_zero,
    "max_grad_norm": _at_least_zero,
    "expected_batch_size": _at_least_zero,
    "secure_randomness": _flag,
    "assumptions": _texts,
    "notes": _texts,
    "versions": _versions,
    "dataset_epsilon": _or_none(_at_least_zero),
    "planned_epsilon": _or_none(_at_least_zero),
    "made": _or_none(_day),
    "run": _text,
    "step": _or_none(_event),
    "releases": _releases,
    "dataset": _or_none(_dataset),
}


# ── what contradicts itself ─────────────────────────────────────────────────────────────────────────


def _refuse_contradictions(values: dict[str, Any]) -> None:
    epsilon, lower, planned = values["epsilon"], values["epsilon_lower"], values["planned_epsilon"]
    if lower > epsilon:
        raise _contradiction(f"epsilon_lower {lower} is above epsilon {epsilon}")
    if planned is not None and planned < lower:
        raise _contradiction(f"planned_epsilon {planned} is below what was spent, {lower}")
    if values["steps"] > values["planned_steps"]:
        raise _contradiction(f"{values['steps']} steps are more than the {values['planned_steps']} that were planned")
    step = values.get("step")
    if step is None:
        if values.get("releases") or values.get("dataset"):
            raise _contradiction("it lists releases and no step")
        return
    taken = sum(release.count for release in values["releases"] if release.label == TRAINING_STEP)
    if taken != values["steps"]:
        raise _contradiction(f"it lists {taken} steps and says that there were {values['steps']}")
    if isinstance(step, PoissonSampled) and isinstance(step.event, Gaussian):
        said = (values["sample_rate"], values["noise_multiplier"])
        if (step.sample_rate, step.event.noise_multiplier) != said:
            raise _contradiction(f"its step is {step}, and sample_rate and noise_multiplier are {said}")
    spent, delta = _spent(values), values["delta"]
    so_far = _refuse_less_than_spent("epsilon", epsilon, spent.run, spent, delta)
    if lower > so_far.upper * (1 + _ROUNDING):
        raise _contradiction(
            f"epsilon_lower is {lower} at delta = {delta}, and the releases it lists spend at most {so_far.upper}"
        )
    if planned is not None:
        _refuse_less_than_spent("planned_epsilon", planned, spent.after(values["planned_steps"]), spent, delta)
    dataset = values["dataset"]
    if (dataset is None) != (values["dataset_epsilon"] is None):
        raise _contradiction("dataset and dataset_epsilon are given one without the other")
    if dataset is not None:
        of_all, listed = values["dataset_epsilon"], counted(dataset.releases)
        for event, count in spent.run.items():
            if listed.get(event, 0) < count:
                raise _contradiction(
                    f"the run made {count} releases of {event}, and the dataset's ledger lists {listed.get(event, 0)}"
                )
        if dataset.adaptive and of_all != math.inf:
            if of_all != dataset.budget[0] or delta < dataset.budget[1]:
                raise _contradiction("under an adaptive budget dataset_epsilon is the budget's, from its delta on")
            _refuse_less_than_spent("the adaptive budget", of_all, listed, spent, dataset.budget[1])
        _refuse_less_than_spent("dataset_epsilon", of_all, listed, spent, delta)


def _spent(values: dict[str, Any]) -> Spent:
    dataset: DatasetRecord | None = values["dataset"]
    return Spent(
        run=counted(values["releases"]),
        step=values["step"],
        steps=values["steps"],
        planned_steps=values["planned_steps"],
        dataset=None if dataset is None else counted(dataset.releases),
        guarantee=None if dataset is None or not dataset.adaptive else dataset.budget,
        relation=_RELATIONS[values["relation"]],
    )


def _refuse_less_than_spent(
    name: str, epsilon: float, releases: Mapping[Event, int], spent: Spent, delta: float
) -> Interval:
    """What the releases spend, certified from both sides."""
    composed = Composed(tuple(event * count for event, count in releases.items()))
    bounds = PRVAccountant(relation=spent.relation).compose(composed).interval(delta)
    if epsilon < bounds.lower * (1 - _ROUNDING):
        raise _contradiction(
            f"{name} is {epsilon} at delta = {delta}, and the releases it lists spend at least {bounds.lower}"
        )
    return bounds


def _refuse_better_readings(said: object, values: dict[str, Any]) -> None:
    """Whoever has no accountant takes the readings as they stand. None says nothing, and is no lie."""
    if said is None:
        return
    if values.get("step") is None:
        raise _contradiction("it has readings and no releases")
    rows = said.get("at_deltas") if isinstance(said, dict) else None
    if not isinstance(rows, list) or len(rows) > _MOST_DELTAS or not all(isinstance(row, dict) for row in rows):
        raise _wrong("readings", type(said).__name__, "what dpdl.readings computes")
    deltas = [_delta("readings.delta", row.get("delta")) for row in rows]
    proved = readings(_spent(values), delta=values["delta"], deltas=deltas).to_dict()
    proved["at_deltas"] = [row for row in proved["at_deltas"] if row["delta"] in deltas]
    _refuse_better("readings", said, proved, point=False)


def _refuse_better(name: str, said: object, proved: Any, *, point: bool) -> None:
    """Walk both; a bound must not be better than what is proved, and what it is a bound at must be the same."""
    if said is None:
        return
    if isinstance(proved, dict):
        if not isinstance(said, dict) or set(said) != set(proved):
            raise _wrong(name, said, f"an object with {sorted(proved)}")
        for key, value in proved.items():
            _refuse_better(f"{name}.{key}", said[key], value, point=key in _POINTS)
        return
    if isinstance(proved, (list, tuple)):
        if not isinstance(said, list) or len(said) != len(proved):
            raise _wrong(name, said, f"a list of {len(proved)}")
        pair = name.split(".")[-1].split("[")[0] in _PAIRS and "[" in name
        for i, (each, value) in enumerate(zip(said, proved, strict=True)):
            _refuse_better(f"{name}[{i}]", each, value, point=point or (pair and i == 0))
        return
    if proved is None or isinstance(proved, bool):
        if said is not proved:
            raise _contradiction(f"{name} is {said!r}, where {proved!r} follows from the releases it lists")
        return
    number, most = _number(name, said), math.inf if proved == "inf" else proved
    if point:
        better = number != most
    elif name.split("[")[0].endswith(".beta"):
        better = not number <= most + _MARGIN
    else:
        better = not number >= most * (1 - _MARGIN) - _ROUNDING
    if better:
        raise _contradiction(f"{name} is {number}, where {most} follows from the releases it lists")


def _contradiction(what: str) -> ParameterError:
    return ParameterError(f"The report contradicts itself: {what}. Ask whoever made it for another.")
