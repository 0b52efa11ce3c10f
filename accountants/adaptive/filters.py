"""Fully adaptive composition within a budget: each next mechanism, and its parameters, chosen from what was seen.

An accountant's epsilon is valid for a run whose noise, rates and length were fixed in advance. A filter is valid for
any analyst: who adds noise when the loss is high, trains on while it falls, or stops as soon as the figure looks
right. It answers each request by yes or no, and promises its budget whatever was asked.

    "rdp"     at ONE order a: the sum of Renyi divergences R(a) is kept to a budget B(a)                 [1, 2]
    "gdp"     the sum of mu^2 is kept to a mu^2; un-sampled Gaussians only, but nothing is lost to them  [3, 4]
    "zcdp"    the sum of rho is kept to a rho; un-sampled noise                                          [2, 5]

**Why one order.** With L the privacy loss so far and R_i the divergence of step i at order a, given the past,
exp((a - 1) (L - sum R_i)) is a supermartingale under the data set that L is drawn from; when the sum never passes B,
E exp((a - 1) L) <= e^((a - 1) B), which is (a, B)-Renyi privacy of everything together, and the usual conversion
gives (epsilon, delta). Choosing the best order afterwards would be choosing from what was seen: B(a) holds at the order
fixed in advance, at others nothing was kept. (zCDP keeps every order at once: a times the sum of rho is at most
a times the budget.) The sums are rounded up step by step.

`spent` and `remaining` are book-keeping, not claims: the claim is the budget. For a bound that follows what has
been spent, see `odometer`.

Example:
    >>> from accountants.events import Gaussian, PoissonSampled
    >>> step = PoissonSampled(0.01, Gaussian(1.0))
    >>> budget = PrivacyFilter(epsilon=2.0, delta=1e-5, planned=900 * step)
    >>> while budget.request(step):
    ...     pass                            # run the step, look at the model, choose the next
    >>> budget.granted, budget.request(step), budget.request(PoissonSampled(0.01, Gaussian(9.0)))
    (881, False, True)

References:
    [1] Feldman, Zrnic, Individual Privacy Accounting via a Renyi Filter, 2021. arXiv:2008.11193
    [2] Lecuyer, Practical Privacy Filters and Odometers with Renyi Differential Privacy, 2021. arXiv:2103.01379
    [3] Smith, Thakurta, Fully Adaptive Composition for Gaussian Differential Privacy, 2022. arXiv:2210.17520
    [4] Koskela, Tobaben, Honkela, Individual Privacy Accounting with Gaussian Differential Privacy, 2022.
        arXiv:2209.15596
    [5] Whitehouse, Ramdas, Rogers, Wu, Fully-Adaptive Composition in Differential Privacy, 2023. arXiv:2203.05481
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from scipy import optimize

from accountants import arguments
from accountants.components.component import Array
from accountants.engines import gaussian
from accountants.errors import ParameterError, UnsupportedEventError
from accountants.events import Event, Repeated
from accountants.rdp_accountant import rdp
from accountants.reduction.normal_form import normal_form
from accountants.relation import NeighboringRelation
from accountants.zcdp_accountant import best_moment_of_rho, concentration, zcdp_epsilon

FilterKind = Literal["rdp", "gdp", "zcdp"]

SCHEMA_VERSION = 1
_ROUNDING = 1e-12  # relative: budgets are rounded down by it, beyond the error of their formulas
_MOST_SIZE = 1e6  # of mu and rho: a larger budget is no privacy


class PrivacyFilter:
    """Grants mechanisms, chosen adaptively, as long as together they keep to (epsilon, delta).

    Args:
        epsilon: the budget, > 0.
        delta: of the budget, in (0, 1).
        kind: what is added up; see the module.
        order: "rdp" only: the Renyi order > 1. By default, the best for a Gaussian that just meets the budget; for
            sampled steps that order is usually too high, and can waste most of the budget: give `planned`.
        planned: "rdp" only, in place of order: takes the order at which the budget lasts for the largest multiple of
            this event, which must be public and fixed in advance. What is requested may differ.
        relation: the neighbouring relation.

    Guarantee:
        If every mechanism that touches the data is requested before it runs, and runs only if granted, everything
        released is (epsilon, delta)-differentially private under the relation, at whatever moment it ends.

    Raises:
        ParameterError: an argument out of range, or an order at which no spending proves the budget.
        UnsupportedEventError: no proof for the planned event.

    References:
        Feldman, Zrnic, 2021. arXiv:2008.11193; Lecuyer, 2021. arXiv:2103.01379; Whitehouse et al., 2023.
        arXiv:2203.05481 (the module has which proves what).
    """

    def __init__(
        self,
        *,
        epsilon: float,
        delta: float,
        kind: FilterKind | str = "rdp",
        order: float | None = None,
        planned: Event | None = None,
        relation: NeighboringRelation | str = NeighboringRelation.ADD_OR_REMOVE,
    ) -> None:
        self._epsilon, self._delta = _positive_epsilon(epsilon), arguments.delta(delta)
        self._relation = NeighboringRelation.of(relation)
        if kind not in ("rdp", "gdp", "zcdp"):
            raise ParameterError(f"kind must be 'rdp', 'gdp' or 'zcdp', got {kind!r}.")
        if kind != "rdp" and (order is not None or planned is not None):
            raise ParameterError(f"order and planned choose a Renyi order; kind {kind!r} has none. Leave them out.")
        self._kind = kind
        self._meter: _Meter
        if kind == "gdp":
            self._meter = _Gaussian(self._epsilon, self._delta, self._relation)
        elif kind == "zcdp":
            self._meter = _Concentrated(self._epsilon, self._delta, self._relation)
        else:
            self._meter = _Renyi(self._epsilon, self._delta, self._relation, self._order(order, planned))
        self._spent = 0.0
        self._granted = 0

    def _order(self, order: float | None, planned: Event | None) -> float:
        if order is not None and planned is not None:
            raise ParameterError("order and planned both choose the Renyi order. Give one of them.")
        if planned is not None:
            return order_for_plan(planned, epsilon=self._epsilon, delta=self._delta, relation=self._relation)
        return order_for_budget(self._epsilon, self._delta) if order is None else _valid_order(order)

    @property
    def order(self) -> float | None:
        """The Renyi order, fixed when the filter was made; None for other kinds."""
        return self._meter.order

    @property
    def budget(self) -> float:
        """What may be spent: Renyi divergence at `order`, mu^2 or rho."""
        return self._meter.budget

    @property
    def spent(self) -> float:
        """What has been granted, in the unit of `budget`, rounded up."""
        return self._spent

    @property
    def remaining(self) -> float:
        """What may still be granted, in the unit of `budget`."""
        return max(0.0, self.budget - self._spent)

    @property
    def granted(self) -> int:
        """How many mechanisms have been granted, repetitions counted."""
        return self._granted

    def would_exceed(self, event: Event, count: int = 1) -> bool:
        """Whether `count` runs of `event`, all together, would be refused now; charges nothing.

        Raises:
            ParameterError: not an event, or a count that is not an int >= 0.
            UnsupportedEventError: no proof for this event.
        """
        return self._after(event, count) > self.budget

    def request(self, event: Event, count: int = 1) -> bool:
        """Whether `count` runs of `event` may run: True charges them all, False charges nothing.

        A refusal ends nothing: a smaller request may still be granted.

        Raises:
            ParameterError: not an event, or a count that is not an int >= 0; nothing is charged.
            UnsupportedEventError: no proof for this event; nothing is charged.
        """
        after = self._after(event, count)
        if after > self.budget:
            return False
        self._spent = after
        self._granted += count
        return True

    def _after(self, event: Event, count: int) -> float:
        """What would have been spent, rounded up."""
        runs = Repeated(event, arguments.steps(count, "count"))
        if runs.count == 0:
            return self._spent
        cost = self._meter.cost(runs.event) * runs.count
        return math.nextafter(self._spent + math.nextafter(cost, math.inf), math.inf) if cost else self._spent

    def state_dict(self) -> dict[str, Any]:
        """The filter as plain values that JSON keeps exactly."""
        return {**self._identity(), "spent": self._spent, "granted": self._granted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a filter with the same budget had spent, from its `state_dict`.

        Raises:
            ParameterError: another budget, kind, order or relation; a missing or unknown field; or less spent than
                this filter has already granted: what was released stays released. Nothing is loaded then.
        """
        expected = self._identity()
        check_state(state, expected, extra=("spent", "granted"), owner="PrivacyFilter")
        spent = arguments.real("spent", state["spent"], remedy="Load what state_dict returned.")
        granted = arguments.steps(state["granted"], "granted")
        if not self._spent <= spent <= self.budget or granted < self._granted:
            raise ParameterError(
                f"spent must be from {self._spent!r} (already granted) to {self.budget!r} (the budget), got {spent!r} "
                f"after {granted} grants. A loaded state cannot lower what was spent: start from the latest state."
            )
        self._spent, self._granted = spent, granted

    def _identity(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": self._kind,
            "epsilon": self._epsilon,
            "delta": self._delta,
            "order": self.order,
            "relation": self._relation.value,
        }


def check_state(state: Mapping[str, Any], expected: Mapping[str, Any], *, extra: tuple[str, ...], owner: str) -> None:
    """Refuse a state whose fields are not `expected` and `extra`, or whose expected fields have other values."""
    fields = set(expected) | set(extra)
    if not isinstance(state, Mapping) or set(state) != fields:
        got = sorted(state) if isinstance(state, Mapping) else state
        raise ParameterError(f"state of {owner} must have the fields {sorted(fields)}, got {got!r}.")
    for name, value in expected.items():
        if type(state[name]) is not type(value) or state[name] != value:
            raise ParameterError(
                f"state of {owner} has {name} {state[name]!r}, this one {value!r}. Make it with the same arguments."
            )


class _Meter(abc.ABC):
    """A budget, and what one event takes of it."""

    budget: float
    order: float | None = None

    @abc.abstractmethod
    def cost(self, event: Event) -> float:
        """From above, in the unit of the budget; inf without noise."""


class _Renyi(_Meter):
    def __init__(self, epsilon: float, delta: float, relation: NeighboringRelation, order: float) -> None:
        self.order = order
        self.budget = float(renyi_budget(np.array([order - 1]), epsilon, delta)[0]) * (1 - _ROUNDING)
        if not self.budget > 0:
            raise ParameterError(
                f"order {order!r} proves no epsilon as small as {epsilon!r} at delta {delta!r}, however little is "
                f"spent. Use a larger order, or leave it out: {order_for_budget(epsilon, delta):.4g} is the default."
            )
        self._relation = relation

    def cost(self, event: Event) -> float:
        """Renyi divergence at the order."""
        assert self.order is not None
        return _divergence(event, self.order, self._relation)


class _Gaussian(_Meter):
    def __init__(self, epsilon: float, delta: float, relation: NeighboringRelation) -> None:
        self._relation = relation
        within = functools.partial(_within_gaussian, epsilon=epsilon, delta=delta)
        self.budget = _largest(within) ** 2 * (1 - _ROUNDING)

    def cost(self, event: Event) -> float:
        """mu^2."""
        mu = normal_form(event, self._relation).gaussian_mu
        if mu is None:
            raise UnsupportedEventError(
                f"a filter of kind 'gdp' takes un-sampled Gaussians only, got {event!r}. Use kind='rdp'."
            )
        return mu * mu * (1 + _ROUNDING)


class _Concentrated(_Meter):
    def __init__(self, epsilon: float, delta: float, relation: NeighboringRelation) -> None:
        self._relation = relation
        self.budget = _rho_budget(epsilon, delta)

    def cost(self, event: Event) -> float:
        """rho."""
        form = normal_form(event, self._relation)
        if form.unbounded:
            return math.inf
        parts = [(count, *concentration(component)) for component, count in form.counts]
        if any(xi > 0 for _, xi, _ in parts):
            raise UnsupportedEventError(
                f"a filter of kind 'zcdp' adds up rho alone, and {event!r} has xi > 0. Use kind='rdp'."
            )
        return math.fsum(count * rho for count, _, rho in parts) * (1 + _ROUNDING)


@functools.lru_cache(maxsize=256)  # training requests the same step again and again
def _divergence(event: Event, order: float, relation: NeighboringRelation) -> float:
    return float(rdp(event, order, relation=relation))


def renyi_budget(t: Array, epsilon: float, delta: float) -> Array:
    """The largest divergence at order 1 + t from which the conversion of RDPAccountant proves (epsilon, delta).

    B = epsilon + log(1 + 1/t) - (log(1/delta) - log(1 + t)) / t; not positive where nothing does. Shape as t.
    """
    budget: Array = epsilon + np.log1p(1 / t) + (math.log(delta) + np.log1p(t)) / t
    return budget


def order_for_budget(epsilon: float, delta: float) -> float:
    """The order at which Gaussian noise may be spent longest: that of the Gaussian whose epsilon is the budget's."""
    return 1 + best_moment_of_rho(_rho_budget(epsilon, delta), delta)


def order_for_plan(planned: Event, *, epsilon: float, delta: float, relation: NeighboringRelation) -> float:
    """The order at which the budget is the largest multiple of what `planned` spends.

    Args:
        planned: everything that the run is to release.
        epsilon, delta: the budget, as in `PrivacyFilter`.
        relation: the neighbouring relation.

    Raises:
        ParameterError: the planned event spends nothing, or everything.
    """
    near = order_for_budget(epsilon, delta) - 1

    def log_share(log_t: Array) -> Array:
        t = np.exp(log_t)
        budget = renyi_budget(t, epsilon, delta)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(budget > 0, np.log(rdp(planned, 1 + t, relation=relation) / budget), math.inf)

    grid = math.log(near) + np.linspace(-4, 4, 33)
    shares = log_share(grid)
    at = int(np.argmin(shares))
    if not math.isfinite(shares[at]):
        raise ParameterError(f"planned must spend something and not everything, got {planned!r}. Give the planned run.")
    refined = optimize.minimize_scalar(
        lambda u: float(log_share(np.array([u]))[0]),
        bounds=(grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]),
        method="bounded",
    )
    return 1 + math.exp(refined.x if refined.fun < shares[at] else grid[at])


@functools.lru_cache(maxsize=64)
def _rho_budget(epsilon: float, delta: float) -> float:
    return _largest(lambda rho: zcdp_epsilon(rho, delta) <= epsilon)


def _within_gaussian(mu: float, epsilon: float, delta: float) -> bool:
    return gaussian.delta_bounds(mu, epsilon)[1] <= delta


def _largest(within: Callable[[float], bool]) -> float:
    """The largest size in (0, _MOST_SIZE] that is within, to 1e-12 relative, from below; by halves of its logarithm."""
    low, high = 1e-300, _MOST_SIZE
    if within(high):
        return high
    while high > low * (1 + _ROUNDING):
        middle = math.sqrt(low * high) if high > 2 * low else (low + high) / 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low


def _positive_epsilon(value: object) -> float:
    epsilon = arguments.epsilon(value)
    if epsilon == 0:
        raise ParameterError("epsilon must be > 0, got 0. A filter needs something to spend, for example 1.0.")
    return epsilon


def _valid_order(value: object) -> float:
    remedy = "Give a Renyi order such as 16, or leave it out."
    order = arguments.real("order", value, remedy=remedy)
    if not 1 < order < math.inf:
        raise ParameterError(f"order must be finite and > 1, got {order!r}. {remedy}")
    return order
