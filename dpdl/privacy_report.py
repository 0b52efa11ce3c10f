"""What a private run may claim, in words and in JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, localcontext
from typing import Any

__all__ = ["PrivacyReport", "rounded_down", "rounded_up", "shown_delta"]

_SCHEMA = "dpdl.report/1"


@dataclass(frozen=True, kw_only=True)
class PrivacyReport:
    """The claim of a run so far, and all that it rests on.

    Attributes:
        epsilon: upper bound on the privacy loss at `delta`, over all releases so far.
        epsilon_lower: lower bound on the same, from the same accountant: how tight the claim is.
        delta: the probability that is given away.
        relation: what neighbouring datasets differ in, in words.
        unit: what one record is.
        sampling: how batches were drawn, in words.
        mechanism: how releases were protected, in words.
        accountant: what computed the bounds.
        steps: releases so far.
        planned_steps: releases that the plan allows.
        sample_rate, noise_multiplier, max_grad_norm, expected_batch_size: the plan's numbers.
        secure_randomness: whether noise and sampling came from keys that nobody knows.
        assumptions: what must hold outside of this library for the claim to hold.
        notes: what a reader should know of this run.
        versions: libraries that computed it.
        dataset_epsilon: upper bound at `delta` for all runs in the ledger that this one shares; None if it shares none.
            Under an adaptive budget that is the budget's own, whatever has been spent of it.
        planned_epsilon: upper bound at `delta` once all planned steps are taken: the claim if the run was ended by
            looking at what it released.
    """

    epsilon: float
    epsilon_lower: float
    delta: float
    relation: str
    unit: str
    sampling: str
    mechanism: str
    accountant: str
    steps: int
    planned_steps: int
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: float
    secure_randomness: bool
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    dataset_epsilon: float | None = None
    planned_epsilon: float | None = None

    def __str__(self) -> str:
        if math.isinf(self.epsilon):
            claim = f"NO GUARANTEE: epsilon is infinite at delta = {shown_delta(self.delta)}, {self.relation}"
        else:
            claim = f"epsilon <= {rounded_up(self.epsilon)} at delta = {shown_delta(self.delta)}, {self.relation}"
        sentences = [
            f"{claim}; {self.steps:,} of {self.planned_steps:,} planned steps, {self.sampling}, {self.mechanism}."
        ]
        sentences += [f"{note[0].upper()}{note[1:]}." for note in self.notes]
        return " ".join(sentences)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values; an infinite epsilon is the string "inf"."""
        return {"schema": _SCHEMA, "claim": str(self), **_finite(asdict(self))}

    def to_json(self) -> str:
        """The report as JSON, with its schema."""
        return json.dumps(self.to_dict(), indent=2)


def rounded_up(value: float, digits: int = 2) -> str:
    """The least number with `digits` decimals that is not below `value`: a displayed bound must still be one."""
    return _rounded(value, digits, ROUND_CEILING)


def rounded_down(value: float, digits: int = 2) -> str:
    """The greatest number with `digits` decimals that is not above `value`, for lower bounds."""
    return _rounded(value, digits, ROUND_FLOOR)


def _rounded(value: float, digits: int, rounding: str) -> str:
    if math.isinf(value):
        return "inf"
    with localcontext(prec=400):  # all digits of any float
        return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding))


def shown_delta(delta: float) -> str:
    """delta in few digits, if those do not claim less than it is."""
    short = f"{delta:g}"
    return short if float(short) >= delta else repr(delta)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {k: "inf" if isinstance(v, float) and math.isinf(v) else v for k, v in values.items()}
