"""What a private run may claim, in words and in JSON.

    report = optimizer.report(delta=1e-5)                   # milliseconds: the claim, and what it rests on
    Path("report.json").write_text(report.to_json())        # with the releases, and what they mean
    again = PrivacyReport.from_json(Path("report.json").read_text())

The releases are in the report, so everything else can be computed from it, whenever somebody asks: `readings`, and the
page that `dpdl.report.report_page` makes. `dpdl/report/report-2.schema.json` is the JSON's schema.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, localcontext
from typing import Any

from accountants import Event, NeighboringRelation
from dpdl.errors import ParameterError
from dpdl.readings import Readings, Spent, readings
from dpdl.releases import DatasetRecord, Release, counted
from dpdl.report_reading import SCHEMA, digest_of, report_values

__all__ = ["PrivacyReport", "figures_down", "figures_up", "percent_up", "rounded_down", "rounded_up", "shown_delta"]

_RELATIONS = {relation.phrase: relation for relation in NeighboringRelation}


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
        made: the day, in UTC, as 2026-05-03; None if it is not known.
        run: what the run is called in a ledger.
        step: one step of the plan; None in a report of schema 1, which lists no releases.
        releases: all that the run has released: steps, and whatever was recorded in its ledger besides.
        dataset: what all runs in the ledger that this one shares have released; None if it shares none.
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
    made: str | None = None
    run: str = ""
    step: Event | None = None
    releases: tuple[Release, ...] = ()
    dataset: DatasetRecord | None = None

    def __str__(self) -> str:
        return " ".join([self.sentence, *(f"{note[0].upper()}{note[1:]}." for note in self.notes)])

    @property
    def sentence(self) -> str:
        """The claim as one sentence, without the notes."""
        if not self.guaranteed:
            claim = f"NO GUARANTEE: epsilon is infinite at delta = {shown_delta(self.delta)}, {self.relation}"
        else:
            claim = f"epsilon <= {rounded_up(self.epsilon)} at delta = {shown_delta(self.delta)}, {self.relation}"
        return f"{claim}; {self.steps:,} of {self.planned_steps:,} planned steps, {self.sampling}, {self.mechanism}."

    @property
    def guaranteed(self) -> bool:
        """Whether anything is promised at `delta`."""
        return math.isfinite(self.epsilon)

    @property
    def neighboring_relation(self) -> NeighboringRelation:
        """What neighbouring datasets differ in.

        Raises:
            ParameterError: `relation` says it in other words than the accountants.
        """
        if self.relation not in _RELATIONS:
            raise ParameterError(f"relation must be one of {list(_RELATIONS)}, got {self.relation!r}.")
        return _RELATIONS[self.relation]

    def readings(self, *, deltas: Sequence[float] = ()) -> Readings | None:
        """What the releases mean: epsilon over the steps and at several deltas, trade-off curve, attackers' bounds.

        It is computed when it is asked for: about 0.3 s for one kind of step, a few seconds for many kinds.

        Args:
            deltas: at which epsilon is wanted besides the usual ones.

        Returns:
            None if the report lists no releases (schema 1).

        Raises:
            ParameterError: a delta outside (0, 1).
        """
        spent = self.spent
        return None if spent is None else readings(spent, delta=self.delta, deltas=deltas)

    @property
    def spent(self) -> Spent | None:
        """The releases, as the accountants take them; None if the report lists none (schema 1).

        Raises:
            ParameterError: `relation` says it in other words than the accountants.
        """
        if self.step is None:
            return None
        dataset = self.dataset
        return Spent(
            run=counted(self.releases),
            step=self.step,
            steps=self.steps,
            planned_steps=self.planned_steps,
            dataset=None if dataset is None else counted(dataset.releases),
            guarantee=None if dataset is None or not dataset.adaptive else dataset.budget,
            relation=self.neighboring_relation,
        )

    def to_dict(self, *, deltas: Sequence[float] = ()) -> dict[str, Any]:
        """The report as plain values, with its readings; an infinite number is the string "inf".

        Args:
            deltas: as in `readings`.
        """
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        read = self.readings(deltas=deltas)
        document = {
            "schema": SCHEMA,
            "claim": str(self),
            **values,
            "readings": None if read is None else read.to_dict(),
        }
        return {**document, "sha256": digest_of(document)}

    def to_json(self) -> str:
        """The report as JSON, with its schema."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> PrivacyReport:
        """The report that `to_json` wrote, of schema 1 or 2, with or without what `dpdl train` adds to it.

        It says what its maker claims. A file that was changed by accident or carelessly is refused, and so is one whose
        epsilon is below what its own releases are proved to spend; nothing proves that it lists all of them.

        Raises:
            ParameterError: it is damaged, something else, or contradicts itself.
        """
        values, claim = report_values(text, {field.name for field in fields(cls)})
        report = cls(**values)
        if claim != str(report):
            raise ParameterError(
                "The report's claim and its numbers differ: one of them was changed. Ask whoever made it for another."
            )
        return report


def rounded_up(value: float, digits: int = 2) -> str:
    """The least number with `digits` decimals that is not below `value`: a displayed bound must still be one."""
    return _rounded(value, digits, ROUND_CEILING)


def rounded_down(value: float, digits: int = 2) -> str:
    """The greatest number with `digits` decimals that is not above `value`, for lower bounds."""
    return _rounded(value, digits, ROUND_FLOOR)


def figures_up(value: float, figures: int = 6) -> str:
    """A number in few figures, not below it: for a rate, or an epsilon.

    Example:
        >>> figures_up(0.3), figures_up(1 / 3), figures_down(1.0000009), figures_down(1.1)
        ('0.3', '0.333334', '1', '1.1')
    """
    return _in_figures(value, figures, ROUND_CEILING)


def figures_down(value: float, figures: int = 6) -> str:
    """A number in few figures, not above it: for noise, of which less protects less."""
    return _in_figures(value, figures, ROUND_FLOOR)


def _in_figures(value: float, figures: int, rounding: str) -> str:
    short = f"{value:.{figures}g}"
    if float(short) == value or math.isinf(value):  # 0.3 is a little less as a float, and 0.3 all the same
        return short
    with localcontext(prec=figures, rounding=rounding):
        return f"{float(+Decimal(value)):.{figures}g}"


def _rounded(value: float, digits: int, rounding: str) -> str:
    if math.isinf(value):
        return "inf"
    with localcontext(prec=400):  # all digits of any float
        return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding))


def shown_delta(delta: float) -> str:
    """delta in few digits, if those do not claim less than it is."""
    short = f"{delta:g}"
    return short if float(short) >= delta else repr(delta)


def percent_up(share: float, digits: int = 1) -> str:
    """A share as the least percentage with `digits` decimals that is not below it.

    Example:
        >>> percent_up(0.0423), percent_up(1.0), percent_up(0.25)
        ('4.3 %', '100 %', '25 %')
    """
    with localcontext(prec=400):
        exact = (Decimal(share) * 100).quantize(Decimal(1).scaleb(-digits), ROUND_CEILING)
    return f"{str(exact).rstrip('0').rstrip('.') if '.' in str(exact) else exact} %"


def _plain(value: Any) -> Any:
    """As JSON has it, which has no infinity."""
    if isinstance(value, Event):
        return json.loads(value.to_json())
    if isinstance(value, (Release, DatasetRecord)):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value
