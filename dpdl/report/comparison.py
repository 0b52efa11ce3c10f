"""An audit beside a report: whether both can be right, and where that cannot be said, why not.

An audit bounds epsilon from below, a report from above; they can be compared at the same delta and under the same
neighbouring relation only. Replacing an example is about two steps of adding or removing one: an audit of the one may
find far more than the other allows, and nothing is wrong. So the report's bound is computed anew from its releases, at
the audit's delta and under the audit's relation. Where that cannot be done nothing is compared, and the page says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accountants import Event, Gaussian, Laplace, NeighboringRelation, PoissonSampled, UnsupportedEventError
from dpdl.audit.result import AuditResult, told_apart
from dpdl.privacy_report import PrivacyReport, shown_delta
from dpdl.readings import Readings, most_spent

__all__ = ["Comparison", "compared"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One audit beside the report.

    Attributes:
        audit: what was found.
        bound: what the report's releases promise at the audit's delta and under its relation, planned steps included:
            an upper bound on epsilon. None if that is not known.
        why_not: why `bound` is None; else "".
    """

    audit: AuditResult
    bound: float | None
    why_not: str = ""

    @property
    def contradicts(self) -> bool:
        """Whether the audit and this report cannot both be right."""
        return self.bound is not None and self.audit.epsilon_lower > self.bound

    @property
    def alarms(self) -> bool:
        """Whether the audit contradicts this report, or the claim that it was made with."""
        return self.contradicts or not self.audit.consistent

    @property
    def title(self) -> str:
        """Of the alarm."""
        if self.contradicts:
            return "THE CLAIM IS CONTRADICTED"
        return "AN AUDIT CONTRADICTS THE CLAIM THAT IT WAS HELD AGAINST"

    @property
    def found(self) -> str:
        """What the alarm says, but for the audit's confidence."""
        audit, under = self.audit, self._under
        at = f"at delta = {shown_delta(audit.delta)}{under}"
        if self.contradicts:
            lower, bound = told_apart(audit.epsilon_lower, self.bound)
            return f"{audit.attack} found epsilon >= {lower} {at}, above this report's {bound}"
        lower, claim = told_apart(audit.epsilon_lower, audit.claimed_epsilon)
        if audit.claim_refuted:
            return f"{audit.attack} found epsilon >= {lower} {at}, and refuted the curve of its own claim of {claim}"
        return f"{audit.attack} found epsilon >= {lower} {at}, above its own claim of {claim}"

    @property
    def verdict(self) -> str:
        """In a few words."""
        if self.contradicts:
            return "contradicts the claim"
        if not self.audit.consistent:
            _, claim = told_apart(self.audit.epsilon_lower, self.audit.claimed_epsilon)
            rest = self.why_not or "this report's bound is not passed"
            return f"contradicts its own claim of {claim}; {rest}"
        return self.why_not or "no contradiction"

    @property
    def _under(self) -> str:
        relation = self.audit.relation
        return "" if relation is None else f", {NeighboringRelation(relation).phrase}"


def compared(audits: Sequence[AuditResult], report: PrivacyReport, read: Readings | None) -> list[Comparison]:
    """Each audit beside the report.

    The bound is the larger of what the run spent and what all its planned steps spend: an audit may be of another run
    of the same plan.

    Args:
        audits: of this run, or of others of the same plan.
        report: the claim.
        read: its readings, at the audits' deltas too.
    """
    return [_one(audit, report, read) for audit in audits]


def _one(audit: AuditResult, report: PrivacyReport, read: Readings | None) -> Comparison:
    if audit.relation is None:
        return Comparison(
            audit=audit, bound=None, why_not="not compared: the audit does not say what neighbours differ in"
        )
    if audit.delta == 0:
        return Comparison(audit=audit, bound=None, why_not="not compared: this report promises nothing at delta = 0")
    relation = NeighboringRelation(audit.relation)
    own, stated = report.neighboring_relation, max(report.epsilon, report.planned_epsilon or 0.0)
    same = (audit.delta, relation) == (report.delta, own)
    spent = report.spent
    if spent is None or read is None:
        if same:
            return Comparison(audit=audit, bound=stated)
        why = "not compared: this report lists no releases, from which its bound could be computed"
        return Comparison(audit=audit, bound=None, why_not=f"{why} at this delta and for {relation.phrase}")
    if relation is own:
        (row,) = [row for row in read.at_deltas if row.delta == audit.delta]
        bound = max(row.so_far, row.planned)
        return Comparison(audit=audit, bound=max(bound, stated) if same else bound)
    fixed = next((event for event in (*spent.run, spent.step) if not _is_noise(event)), None)
    if fixed is not None:
        why = f"not compared: the audit is about {relation.phrase}, and what is known of {fixed} about {own.phrase}"
        return Comparison(audit=audit, bound=None, why_not=why)
    try:
        return Comparison(audit=audit, bound=most_spent(spent, delta=audit.delta, relation=relation))
    except UnsupportedEventError as error:
        why = f"not compared: no bound is proved for these releases under {relation.phrase} ({error})"
        return Comparison(audit=audit, bound=None, why_not=why)


def _is_noise(event: Event) -> bool:
    """Whether it says what was done, in units of a clip norm: that has a meaning under every relation."""
    if isinstance(event, PoissonSampled):
        return _is_noise(event.event)
    return isinstance(event, (Gaussian, Laplace))
