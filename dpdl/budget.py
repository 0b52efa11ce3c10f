"""A budget of (epsilon, delta), and how many more releases fit into it.

    budget = Budget(epsilon=3.0, delta=1e-5)

A ledger asks its budget before every release. Computing epsilon takes a millisecond or more, so the answer is
computed ahead: an `Allowance` looks for a *corner*, a number of releases of each kind that together are within the
budget. Whatever is not beyond it in any kind is within the budget too, because a part of a composition spends no more
than the whole, and so a step costs a comparison of whole numbers. Nothing is rounded: the corner's epsilon is the
accountant's upper bound.

Two kinds of budget:

- planned (the default): epsilon as PRVAccountant bounds it, tight, for releases whose noise, rates and number did not
  depend on what was released before. Training until the budget is spent, by equal steps, is of that kind.
- adaptive: releases chosen by looking at earlier ones (noise changed because the loss is high, the next trial's
  settings taken from the last). Its rule is a privacy filter [1]: Renyi divergences at one order, fixed in advance.

References:
    [1] Feldman, Zrnic, Individual Privacy Accounting via a Renyi Filter, 2021. arXiv:2008.11193
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from accountants import Composed, Event, NeighboringRelation, PrivacyFilter, PRVAccountant, arguments
from dpdl.errors import BudgetExceededError, ParameterError

__all__ = ["Allowance", "Budget", "composed"]

# Releases; they bound the search where a budget lasts almost for ever.
MOST_AHEAD = 1 << 16  # looked ahead by a step: 0.3 s once in so many steps, where a million took 1.1 s at the first
FEWEST_AHEAD = 16  # where there are many kinds of release, and each computation takes as many times longer
ROUGHLY = 4  # a corner may lie this part nearer than the budget goes: each bisection less is a computation less
MOST_COUNTED = 1 << 20  # by who asks how many remain

Counts = Mapping[Event, int]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the releases from one dataset may spend together.

    Attributes:
        epsilon: > 0.
        delta: in (0, 1).
        adaptive: whether releases may be chosen by looking at earlier ones; see the module.
        order: the Renyi order of an adaptive budget, > 1; by default the best for un-sampled Gaussian noise. For
            sampled steps take `PrivacyFilter(epsilon=..., delta=..., planned=plan.event()).order`, which lasts longer.

    Guarantee:
        A ledger under a budget refuses the release that would bring the upper bound on what it holds above it.

    Raises:
        ParameterError: a value is out of range.
    """

    epsilon: float
    delta: float
    adaptive: bool = False
    order: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", arguments.epsilon(self.epsilon))
        object.__setattr__(self, "delta", arguments.delta(self.delta))
        if self.epsilon == 0:
            raise ParameterError("epsilon of a budget must be > 0, got 0. Without a budget nothing is released.")
        if type(self.adaptive) is not bool:
            raise ParameterError(f"adaptive must be True or False, got {self.adaptive!r}.")
        if self.order is not None and not self.adaptive:
            raise ParameterError("order is of an adaptive budget. Leave it out, or give adaptive=True.")
        if self.adaptive:
            self._filter(NeighboringRelation.ADD_OR_REMOVE)  # refuses an order that proves nothing

    def allows(self, counts: Counts, relation: NeighboringRelation) -> bool:
        """Whether all of these releases together are within the budget.

        Args:
            counts: how often each event has been released.
            relation: the neighbouring relation under which they are composed.
        """
        if not self.adaptive:
            return composed(counts, relation).epsilon(self.delta) <= self.epsilon
        keeper = self._filter(relation)
        return all(keeper.request(event, count) for event, count in counts.items())

    def is_at_least_as_strict_as(self, other: Budget) -> bool:
        """Whether whatever this budget allows, the other one allows as well."""
        weaker_rule = other.adaptive and (not self.adaptive or self.order != other.order)
        return self.epsilon <= other.epsilon and self.delta <= other.delta and not weaker_rule

    def to_dict(self) -> dict[str, Any]:
        """The budget as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> Budget:
        """The budget that `to_dict` wrote.

        Raises:
            ParameterError: fields are missing, unknown or out of range.
        """
        if not isinstance(values, dict) or set(values) != {"epsilon", "delta", "adaptive", "order"}:
            raise ParameterError(f"Not a budget: {values!r}.")
        return cls(**values)

    def _filter(self, relation: NeighboringRelation) -> PrivacyFilter:
        return PrivacyFilter(epsilon=self.epsilon, delta=self.delta, order=self.order, relation=relation)

    def __str__(self) -> str:
        kind = ", adaptive" if self.adaptive else ""
        return f"epsilon {self.epsilon:g} at delta {self.delta:g}{kind}"


def composed(counts: Counts, relation: NeighboringRelation) -> PRVAccountant:
    """The accountant of these releases together.

    Args:
        counts: how often each event was released.
        relation: the accountant's.
    """
    return PRVAccountant(relation=relation).compose(Composed(tuple(event * n for event, n in counts.items())))


class Allowance:
    """Knows ahead how many more releases fit into a budget.

    Args:
        budget: not to be exceeded.
        relation: what neighbouring datasets differ in.
    """

    def __init__(self, budget: Budget, relation: NeighboringRelation) -> None:
        self.budget = budget
        self._relation = relation
        self._corner: dict[Event, int] = {}  # known to be within the budget
        self._seen: dict[Event, int] | None = None  # what there was when the corner was found

    def covers(self, counts: Counts) -> bool:
        """Whether these counts are known to be within the budget, without computing anything."""
        return all(count <= self._corner.get(event, 0) for event, count in counts.items())

    def refuse(self, counts: Counts, event: Event, *, count: int = 1, where: str = "the ledger") -> None:
        """Raise unless `count` more releases of `event` fit beside `counts`.

        Args:
            counts: what was released, by event.
            event: what is to be.
            count: how often.
            where: whose budget it is, for the message.

        Raises:
            BudgetExceededError: they do not.
        """
        if self.fits(counts, event, count=count):
            return
        spent = composed(counts, self._relation).epsilon(self.budget.delta)
        after = composed(_plus(counts, {event: count}), self._relation).epsilon(self.budget.delta)
        measured = "its filter's sum would pass the budget" if self.budget.adaptive else f"it would spend {after:.6g}"
        raise BudgetExceededError(
            f"One more release would overspend the budget of {where}, {self.budget}: {spent:.6g} is spent, and with "
            f"{event if count == 1 else event * count} {measured}. Nothing was released or recorded. Publish what "
            "there is, or plan less (more noise, fewer steps, a smaller sample rate) within a budget that is fixed "
            "before the first release; a larger budget for the same data is a weaker promise, and a new ledger."
        )

    def fits(self, counts: Counts, event: Event, *, count: int = 1) -> bool:
        """Whether `count` more releases of `event` are within the budget beside `counts`.

        Args:
            counts, event, count: as in `refuse`.
        """
        wanted = counts.get(event, 0) + count
        if wanted <= self._corner.get(event, 0) and self.covers(counts):
            return True
        if not self.budget.allows(_plus(counts, {event: count}), self._relation):
            return False
        self._look_ahead(counts, event, count)
        return True

    def remaining(self, counts: Counts, event: Event) -> int:
        """How many more releases of `event` fit beside `counts`, at most about a million."""
        return _most(lambda n: self.budget.allows(_plus(counts, {event: n}), self._relation), MOST_COUNTED)

    def _look_ahead(self, counts: Counts, event: Event, count: int) -> None:
        """Move the corner as far as the budget goes, in the direction in which releases have come since the last one.

        With that, several kinds that alternate need a new corner only when their proportions change.
        """
        seen = counts if self._seen is None else self._seen
        grown = {kind: n - seen.get(kind, 0) for kind, n in counts.items() if n > seen.get(kind, 0)}
        grown[event] = max(grown.get(event, 0), count)
        total = sum(grown.values())

        def ahead(n: int) -> dict[Event, int]:
            shares = {kind: n * share // total for kind, share in grown.items()}
            return _plus(counts, {**shares, event: max(shares[event], count)})

        limit = max(FEWEST_AHEAD, MOST_AHEAD >> 2 * max(0, len(ahead(1)) - 2))
        reach = _most(lambda n: self.budget.allows(ahead(n), self._relation), limit, roughly=ROUGHLY)
        self._corner, self._seen = ahead(reach), dict(counts)


def _plus(counts: Counts, more: Counts) -> dict[Event, int]:
    return {
        event: counts.get(event, 0) + more.get(event, 0) for event in [*counts, *(e for e in more if e not in counts)]
    }


def _most(within: Callable[[int], bool], limit: int, *, roughly: int | None = None) -> int:
    """The largest n up to `limit` with within(n), which falls from True to False once; 0 if within(1) is False.

    With `roughly`, one that is at most that part less.
    """
    good, bad = 0, 1
    while within(bad):
        good, bad = bad, bad * 2
        if good >= limit:
            return good
    while bad - good > (1 if roughly is None else max(1, good // roughly)):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if within(middle) else (good, middle)
    return good
