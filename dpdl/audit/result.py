"""What an audit found: a lower bound on epsilon, the confidence it holds with, and the claim it is held against.

An accountant bounds epsilon from above, by proof; an audit bounds it from below, by attacking. If the lower bound is
above the claim, something is broken: the mechanism, its implementation, or the accounting. If it is not, nothing is
shown.

    >>> found = AuditResult(
    ...     attack="many runs",
    ...     epsilon_lower=1.4142,
    ...     delta=1e-5,
    ...     relation="add_or_remove",
    ...     confidence=0.95,
    ...     claimed_epsilon=2.0,
    ... )
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
from decimal import ROUND_FLOOR, Decimal
from typing import Any

from accountants import NeighboringRelation
from dpdl.audit.verdict import A_FAILURE_PROVES_NOTHING
from dpdl.errors import ParameterError
from dpdl.privacy_report import rounded_down, rounded_up, shown_delta

__all__ = ["AuditResult", "percent_down", "told_apart"]

_SCHEMA = "dpdl.audit/2"
_SCHEMA_1 = "dpdl.audit/1"  # without the relation, which is then unknown
_SINCE_2 = frozenset({"relation", "claim_refuted"})


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """An empirical lower bound on epsilon.

    Attributes:
        attack: who attacked, in a few words: "one run, white box", "many runs", ...
        epsilon_lower: >= 0, the bound at `delta`.
        delta: in [0, 1), the delta at which the bound and the claim are stated.
        relation: what neighbouring datasets differ in, for the bound and the claim: the value of an
            `accountants.NeighboringRelation`, such as "add_or_remove". None only where it is not known, as in files
            of schema 1: such a bound is compared with no other claim.
        confidence: in (0, 1): of all audits of correct mechanisms that meet the assumptions, at least this share
            reports a bound that is at most the true epsilon.
        claimed_epsilon: the upper bound that it is held against, or None if there is no claim.
        claim_refuted: whether the claim's whole curve is refuted, whatever the figure: the epsilon of the largest leak
            that is refuted may be that of the claim itself.
        details: counts and settings: text, numbers, booleans, None, lists and dicts of such, as JSON has them.
        assumptions: what must hold for the bound to hold with that confidence.
        notes: what a reader should know besides: the power of the audit, what it cannot see.

    Raises:
        ParameterError: a number is outside its range, or a detail is not a plain value.
    """

    attack: str
    epsilon_lower: float
    delta: float
    relation: str | None
    confidence: float
    claimed_epsilon: float | None = None
    claim_refuted: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _set = object.__setattr__  # frozen: numbers become plain ones once, here
        for name in ("epsilon_lower", "delta", "confidence", "claimed_epsilon"):
            value = getattr(self, name)
            if value is not None or name != "claimed_epsilon":
                _set(self, name, _number(name, value))
        if not isinstance(self.attack, str):
            raise ParameterError(f"attack must be a text, got {self.attack!r}.")
        if self.relation is not None:
            _set(self, "relation", NeighboringRelation.of(self.relation).value)
        if not isinstance(self.details, Mapping):
            raise ParameterError(f"details must be named values, got {self.details!r}.")
        _set(self, "details", _plain("details", self.details))
        _set(self, "assumptions", _texts("assumptions", self.assumptions))
        _set(self, "notes", _texts("notes", self.notes))
        if not self.epsilon_lower >= 0:
            raise ParameterError(f"epsilon_lower must be >= 0, got {self.epsilon_lower}. Nothing found is 0.")
        if not 0 <= self.delta < 1:
            raise ParameterError(f"delta must be in [0, 1), got {self.delta}.")
        if not 0 < self.confidence < 1:
            raise ParameterError(f"confidence must be in (0, 1), got {self.confidence}. Give for example 0.95.")
        if self.claimed_epsilon is not None and not self.claimed_epsilon >= 0:
            raise ParameterError(f"claimed_epsilon must be >= 0 or None, got {self.claimed_epsilon}.")
        if type(self.claim_refuted) is not bool or (self.claim_refuted and self.claimed_epsilon is None):
            raise ParameterError(f"claim_refuted must be False, or True of a claim, got {self.claim_refuted!r}.")

    @property
    def consistent(self) -> bool:
        """Whether the claim, if there is one, survived: the bound is not above it, nor is its curve refuted."""
        return self.claimed_epsilon is None or not (self.claim_refuted or self.epsilon_lower > self.claimed_epsilon)

    def __str__(self) -> str:
        found, claim = told_apart(self.epsilon_lower, self.claimed_epsilon)
        text = (
            f"{self.attack}: epsilon >= {found} at delta = {shown_delta(self.delta)} with confidence "
            f"{percent_down(self.confidence)}"
        )
        if self.claimed_epsilon is None:
            return f"{text}; {A_FAILURE_PROVES_NOTHING}"
        if self.consistent:
            return f"{text}, within the claim of {claim}; {A_FAILURE_PROVES_NOTHING}"
        if self.epsilon_lower <= self.claimed_epsilon:
            return (
                f"{text}, and the curve of the claim of {claim} is refuted: the claim is contradicted, or one of the "
                "audit's assumptions does not hold"
            )
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
        """The result that `to_dict` wrote; of schema 1, too, with an unknown relation.

        Guarantee:
            It says what its maker claims.

        Raises:
            ParameterError: not such values: another schema, or fields missing, unknown, of another kind or out of
                range.
        """
        if not isinstance(values, Mapping) or values.get("schema") not in (_SCHEMA, _SCHEMA_1):
            raise ParameterError(f"Not an audit's result: expected an object with schema {_SCHEMA!r}.")
        given = {name: value for name, value in values.items() if name not in ("schema", "summary", "consistent")}
        if values["schema"] == _SCHEMA_1 and not _SINCE_2 & set(given):
            given |= {"relation": None, "claim_refuted": False}
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

        Guarantee:
            It says what its maker claims.

        Raises:
            ParameterError: not such a text.
        """
        try:
            values = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise ParameterError(f"Not an audit's result: the text is not JSON ({error}).") from error
        return cls.from_dict(values)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise ParameterError(f"{name} must be a number, got {value!r}.")
    try:
        return float(value)
    except OverflowError as error:  # a whole number of more than 308 digits
        raise ParameterError(f"{name} must be a number that fits a double, got one that does not.") from error


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
        raise ParameterError(f"{name} must be a list of texts, got {value!r}.")
    return tuple(value)


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


def percent_down(share: float) -> str:
    """95%, 99.9%, rounded down: a confidence must not be shown as more than it is."""
    return next((f"{float(shown):g}%" for shown in _roundings(share) if shown > 0), f"{share * 100!r}%")


def _roundings(share: float) -> list[Decimal]:
    """Of the share in percent: whole if it is, else to ever more decimals, down."""
    percent = 100 * Decimal(repr(share))  # as it was written: the double nearest to 0.95 is a little less
    exact = [percent.quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR) for digits in (0, 1, 2, 3, 4)]
    return [shown for shown in exact if shown == percent] or exact[2:]


def told_apart(found: float, claim: float | None) -> tuple[str, str]:
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
