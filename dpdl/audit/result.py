"""What an audit found: a lower bound on epsilon, the confidence it holds with, and the claim it is held against.

An accountant bounds epsilon from above, by proof; an audit bounds it from below, by attacking. If the lower bound is
above the claim, something is broken: the mechanism, its implementation, or the accounting. If it is not, nothing is
shown.

    >>> found = AuditResult(attack="many runs", epsilon_lower=1.4142, delta=1e-5, confidence=0.95, claimed_epsilon=2.0)
    >>> found.consistent
    True
    >>> print(found)
    many runs: epsilon >= 1.41 at delta = 1e-05 with confidence 95%, within the claim of 2.00; an attack that fails
    proves nothing: this is no formal guarantee

Private: an audit with planted canaries tells nothing of the other examples beyond what the run released; what an attack
on real examples found is a measurement on them, and not for publication.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dpdl.audit.verdict import A_FAILURE_PROVES_NOTHING
from dpdl.errors import ParameterError
from dpdl.privacy_report import rounded_down, rounded_up, shown_delta

__all__ = ["AuditResult"]

_SCHEMA = "dpdl.audit/1"


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """An empirical lower bound on epsilon.

    Attributes:
        attack: who attacked, in a few words: "one run, white box", "many runs", ...
        epsilon_lower: >= 0, the bound at `delta`.
        delta: in [0, 1), the delta at which the bound and the claim are stated.
        confidence: in (0, 1): of all audits of correct mechanisms that meet the assumptions, at least this share
            reports a bound that is at most the true epsilon.
        claimed_epsilon: the upper bound that it is held against, or None if there is no claim.
        details: counts and settings: text, numbers, booleans, None, lists and dicts of such, as JSON has them.
        assumptions: what must hold for the bound to hold with that confidence.
        notes: what a reader should know besides: the power of the audit, what it cannot see.

    Raises:
        ParameterError: a number is outside its range, or a detail is not a plain value.
    """

    attack: str
    epsilon_lower: float
    delta: float
    confidence: float
    claimed_epsilon: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _set = object.__setattr__  # frozen: numbers become plain ones once, here
        for name in ("epsilon_lower", "delta", "confidence", "claimed_epsilon"):
            value = getattr(self, name)
            if value is not None:
                _set(self, name, _number(name, value))
        _set(self, "details", _plain("details", self.details))
        _set(self, "assumptions", tuple(self.assumptions))
        _set(self, "notes", tuple(self.notes))
        if not self.epsilon_lower >= 0:
            raise ParameterError(f"epsilon_lower must be >= 0, got {self.epsilon_lower}. Nothing found is 0.")
        if not 0 <= self.delta < 1:
            raise ParameterError(f"delta must be in [0, 1), got {self.delta}.")
        if not 0 < self.confidence < 1:
            raise ParameterError(f"confidence must be in (0, 1), got {self.confidence}. Give for example 0.95.")
        if self.claimed_epsilon is not None and not self.claimed_epsilon >= 0:
            raise ParameterError(f"claimed_epsilon must be >= 0 or None, got {self.claimed_epsilon}.")

    @property
    def consistent(self) -> bool:
        """Whether the claim, if there is one, survived: the lower bound is not above it."""
        return self.claimed_epsilon is None or self.epsilon_lower <= self.claimed_epsilon

    def __str__(self) -> str:
        found, claim = _shown(self.epsilon_lower, self.claimed_epsilon)
        text = (
            f"{self.attack}: epsilon >= {found} at delta = {shown_delta(self.delta)} with confidence "
            f"{_percent(self.confidence)}"
        )
        if self.claimed_epsilon is None:
            return f"{text}; {A_FAILURE_PROVES_NOTHING}"
        if self.consistent:
            return f"{text}, within the claim of {claim}; {A_FAILURE_PROVES_NOTHING}"
        return (
            f"{text}, above the claim of {claim}: the claim is contradicted, or one of the audit's assumptions does "
            "not hold"
        )

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values; an infinite number is the string "inf"."""
        values = asdict(self) | {"assumptions": list(self.assumptions), "notes": list(self.notes)}
        found: dict[str, Any] = _without_infinity({"schema": _SCHEMA, "summary": str(self), **values})
        return found | {"consistent": self.consistent}

    def to_json(self) -> str:
        """The result as JSON, with its schema."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AuditResult:
        """The result that `to_dict` wrote.

        Raises:
            ParameterError: not such values: another schema, or fields missing, unknown or out of range.
        """
        if not isinstance(values, Mapping) or values.get("schema") != _SCHEMA:
            raise ParameterError(f"Not an audit's result: expected an object with schema {_SCHEMA!r}.")
        given = {name: value for name, value in values.items() if name not in ("schema", "summary", "consistent")}
        known = {each.name for each in fields(cls)}
        if set(given) != known:
            raise ParameterError(
                f"Not an audit's result: missing fields {sorted(known - set(given))}, unknown fields "
                f"{sorted(set(given) - known)}."
            )
        for name in ("epsilon_lower", "claimed_epsilon"):
            if given[name] == "inf":
                given[name] = math.inf
        return cls(**given)

    @classmethod
    def from_json(cls, text: str) -> AuditResult:
        """The result that `to_json` wrote.

        Raises:
            ParameterError: not such a text.
        """
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, TypeError) as error:
            raise ParameterError(f"Not an audit's result: the text is not JSON ({error}).") from error
        return cls.from_dict(values)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise ParameterError(f"{name} must be a number, got {value!r}.")
    return float(value)


def _plain(name: str, value: Any) -> Any:
    """As JSON has it: numbers of numpy and torch become Python's, tuples become lists."""
    if isinstance(value, float):
        return float(value)  # numpy's float64 is one, too
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}[{key!r}]", each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{name}[{i}]", each) for i, each in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise ParameterError(f"{name} must be a plain value as JSON has it, got a {type(value).__name__}.")


def _without_infinity(value: Any) -> Any:
    """JSON has neither infinity nor NaN."""
    if isinstance(value, dict):
        return {key: _without_infinity(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_infinity(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _percent(share: float) -> str:
    """95%, 99.9%, rounded down: a confidence must not be shown as more than it is."""
    return next((f"{float(shown):g}%" for shown in _roundings(share) if float(shown) > 0), f"{share * 100!r}%")


def _roundings(share: float) -> list[str]:
    """Of the share in percent: whole if it is, else to ever more decimals, down."""
    percent = 100 * share * (1 + 1e-12)  # 0.95 is not binary: 94.99999999999999 would be shown as 94.9
    exact = [rounded_down(percent, digits) for digits in (0, 1, 2, 3, 4)]
    return [shown for shown in exact if abs(float(shown) - percent) < 1e-8] or exact[2:]


def _shown(found: float, claim: float | None) -> tuple[str, str]:
    """What was found, rounded down, and the claim, rounded up, to as many decimals as tell a contradiction."""
    if claim is None or found <= claim:
        return _at_most(found, 2), "" if claim is None else _at_least(claim, 2)
    shown = ((_at_most(found, digits), _at_least(claim, digits)) for digits in range(2, 16))
    return next(((a, b) for a, b in shown if float(a) > float(b)), (repr(found), repr(claim)))


def _at_least(value: float, digits: int) -> str:
    """Rounded up; but 4.4, which is a little more as a float, is 4.40."""
    short = f"{value:.{digits}f}"
    return short if float(short) == value else rounded_up(value, digits)


def _at_most(value: float, digits: int) -> str:
    short = f"{value:.{digits}f}"
    return short if float(short) == value else rounded_down(value, digits)
