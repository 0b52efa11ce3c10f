"""A report's JSON, read: every field of its kind, and none of them contradicting another.

What stands in a file was written by somebody else, or long ago. It is refused where it

- is not what `to_json` wrote: another schema, a field missing or unknown, of another kind, or out of range;
- was changed: the digest is not that of the document (schema 2), or the claim is not that of the numbers;
- cannot be true: epsilon is below what the listed releases certainly spend. That is asked of the accountants' certified
  lower bound, so that a later version, which may prove a smaller epsilon, still reads what an earlier one wrote.

The digest has no key: it finds accidents and careless edits, not someone who writes the whole report anew.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

from accountants import Composed, Event, Gaussian, NeighboringRelation, PoissonSampled, PRVAccountant
from dpdl.errors import ParameterError
from dpdl.releases import TRAINING_STEP, DatasetRecord, Release, counted

__all__ = ["SCHEMA", "digest_of", "report_values"]

SCHEMA = "dpdl.report/2"
SCHEMA_1 = "dpdl.report/1"  # without the releases, and what follows from them
BESIDE_THE_REPORT = ("training", "audits")  # what others may add to the document; its digest does not cover them
SINCE_2 = frozenset({"made", "run", "step", "releases", "dataset"})
REMEDY = "Give what PrivacyReport.to_json, or dpdl train, wrote."
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
    _refuse_less_than_spent("epsilon", epsilon, values["releases"], values)
    dataset = values["dataset"]
    if (dataset is None) != (values["dataset_epsilon"] is None):
        raise _contradiction("dataset and dataset_epsilon are given one without the other")
    if dataset is not None:
        if dataset.adaptive and values["dataset_epsilon"] not in (dataset.budget[0], math.inf):
            raise _contradiction("under an adaptive budget dataset_epsilon is the budget's")
        _refuse_less_than_spent("dataset_epsilon", values["dataset_epsilon"], dataset.releases, values)


def _refuse_less_than_spent(name: str, epsilon: float, releases: tuple[Release, ...], values: dict[str, Any]) -> None:
    spent = Composed(tuple(event * count for event, count in counted(releases).items()))
    bounds = PRVAccountant(relation=_RELATIONS[values["relation"]]).compose(spent).interval(values["delta"])
    if epsilon < bounds.lower:
        raise _contradiction(
            f"{name} is {epsilon} at delta = {values['delta']}, and the releases it lists spend at least {bounds.lower}"
        )


def _contradiction(what: str) -> ParameterError:
    return ParameterError(f"The report contradicts itself: {what}. Ask whoever made it for another.")
