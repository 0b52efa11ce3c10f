"""What each example spent by its own gradients: most clip far below the norm that the common account charges.

A step that adds noise of std noise_multiplier * C to a sum in which one example's gradient has norm r <= C is, for that
example, a step with noise multiplier noise_multiplier * C / r: the Renyi divergence between the run with this
example and the run without it, given the past, is that of PoissonSampled(q, Gaussian(noise_multiplier * C / r)) [1, 2].

**The numbers are private.** An individual epsilon is a function of that example's data (and of everybody's, through
the model): releasing the vector, its maximum, or a histogram of it is a release like any other. They are for the data's
keeper: to see whom the noise protects well, and to drop whom it protects least.

**What they mean.** Steps depend on the past, so an example's total is itself random, known only afterwards.

    epsilon            what an accountant says of a run whose norms were, and had been fixed as, these; a description of
                       this run, comparable with the common epsilon; no bound that may be promised in advance
    odometer_epsilon   a bound on this example's privacy loss that holds with probability 1 - delta at all times, as in
                       `odometer`, whatever the norms depended on
    active             a Renyi filter for each example [1]: who leaves a step when `active` says so has spent
                       at most (epsilon, delta), which is differential privacy for every example, promised beforehand

**Unknown norms.** Under Poisson sampling an example is charged by the norm that its gradient would have had, whether or
not it was drawn: the chance of being drawn is already in q. Only those drawn have a gradient computed, so all others
are charged for the full clip norm unless the caller computes theirs. An earlier norm proves nothing about this step,
unless the example's gradient is clipped to it, drawn or not: then it is a bound, and may be charged.

Norms are rounded up to one of few levels, so that a step costs one table look-up an example; the table of a noise
multiplier and rate is made once. Memory: size * len(orders) floats.

Example:
    >>> import numpy as np
    >>> accountant = IndividualAccountant(size=3)
    >>> for _ in range(100):
    ...     accountant = accountant.step([0.1, 0.5, 7.0], max_grad_norm=1.0, noise_multiplier=1.0, sample_rate=0.1)
    >>> accountant.epsilon(1e-5).round(1)
    array([0.4, 2.6, 7.9])

References:
    [1] Feldman, Zrnic, Individual Privacy Accounting via a Renyi Filter, 2021. arXiv:2008.11193
    [2] Yu, Kamath, Kulkarni, Liu, Yin, Zhang, Individual Privacy Accounting for Differentially Private Stochastic
        Gradient Descent, 2022. arXiv:2206.02617
    [3] Koskela, Tobaben, Honkela, Individual Privacy Accounting with Gaussian Differential Privacy, 2022.
        arXiv:2209.15596
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accountants import arguments
from accountants.adaptive.filters import order_for_budget, renyi_budget
from accountants.adaptive.odometer import time_uniform_epsilon, valid_orders
from accountants.components.component import Array
from accountants.errors import ParameterError, UnsupportedEventError
from accountants.events import Gaussian, PoissonSampled
from accountants.rdp_accountant import rdp
from accountants.relation import NeighboringRelation

DEFAULT_LEVELS = 512
_LEAST_LEVEL = 1e-3  # of the clip norm: smaller norms are charged as this one, a millionth of the full divergence
_MOST_ENTRIES = 10**9  # of the array of size * orders: 8 GB
_MOST_LEVELS = 10**4
_ROWS = 512  # examples charged at a time: their temporary array stays in the cache


class IndividualAccountant:
    """Renyi divergences of every example's own, at fixed orders.

    Args:
        size: number of examples; indices run from 0 to size - 1.
        orders: Renyi orders > 1, fixed in advance; by default those of `odometer.DEFAULT_ORDERS`.
        levels: to how many norms, from a thousandth of the clip norm to all of it in equal ratios, norms are rounded
            up. 512 levels are 1.4 % apart.
        relation: "add_or_remove" or "zero_out". Replacing an example brings in another, whose norms nobody knows.

    Guarantee:
        See the module. Every figure is rounded up: norms to levels, divergences, sums, conversions.

    Raises:
        ParameterError: an argument out of range.
        UnsupportedEventError: relation is "replace_one".

    References:
        Feldman, Zrnic, 2021. arXiv:2008.11193; Yu et al., 2022. arXiv:2206.02617 (the module has both).
    """

    def __init__(
        self,
        *,
        size: int,
        orders: Sequence[float] | None = None,
        levels: int = DEFAULT_LEVELS,
        relation: NeighboringRelation | str = NeighboringRelation.ADD_OR_REMOVE,
    ) -> None:
        self._size = arguments.positive_whole("size", size, remedy="Count the examples.")
        self._orders = valid_orders(orders)
        self._relation = NeighboringRelation.of(relation)
        if self._relation is NeighboringRelation.REPLACE_ONE:
            raise UnsupportedEventError(
                "no individual account under replace_one: the norms of the example that replaces this one are unknown. "
                "Use relation='add_or_remove'."
            )
        # From least to most; index 0 is norm 0, which costs nothing.
        count = arguments.positive_whole("levels", levels, remedy="Give an int >= 1, or leave it out.")
        if count > _MOST_LEVELS:
            raise ParameterError(f"levels must be at most {_MOST_LEVELS}, got {count}. A few hundred lose about 1 %.")
        if self._size * len(self._orders) > _MOST_ENTRIES:
            raise ParameterError(
                f"size must be at most {_MOST_ENTRIES // len(self._orders)} with {len(self._orders)} orders, got "
                f"{self._size}. Give fewer orders, or keep an account for each part of the examples."
            )
        self._levels = np.concatenate([[0.0], np.geomspace(_LEAST_LEVEL, 1.0, count)])
        self._levels[-1] = 1.0
        self._spent = np.zeros((self._size, len(self._orders)))
        self._steps = 0
        self._budget: _Budget | None = None

    @property
    def orders(self) -> tuple[float, ...]:
        """The Renyi orders, fixed when the accountant was made."""
        return self._orders

    @property
    def spent(self) -> Array:
        """Each example's Renyi divergence at each order, rounded up, shape [size, K]; private."""
        return self._rows(None)

    def step(
        self,
        norms: ArrayLike,
        *,
        max_grad_norm: float,
        noise_multiplier: float,
        sample_rate: float,
        indices: ArrayLike | None = None,
    ) -> Self:
        """Charge one step; returns the accountant itself.

        Args:
            norms: L2 norms of the per-sample gradients, before or after clipping, shape [N]; norms above
                max_grad_norm and those that are not finite are charged as max_grad_norm, those that did not take part
                (norm 0) nothing.
            max_grad_norm: C > 0, same unit as norms.
            noise_multiplier: noise std / C, > 0.
            sample_rate: q in [0, 1] of Poisson sampling.
            indices: whose norms these are, shape [N], each at most once; all others are charged for C.
                By default everybody's, in order, N = size.

        Raises:
            ParameterError: an argument out of range, or shapes that do not match; nothing is charged.
        """
        at = self._levels_of(norms, indices, max_grad_norm)
        table = self._table(noise_multiplier, sample_rate)
        for start in range(0, self._size, _ROWS):
            rows = slice(start, start + _ROWS)
            self._spent[rows] += table[at[rows]]
        self._steps += 1
        return self

    def epsilon(self, delta: float, *, indices: ArrayLike | None = None) -> Array:
        """What the run describes each example as having spent, by the best order: see the module; private.

        Args:
            delta: in (0, 1).
            indices: of which examples, shape [N]; by default all.

        Returns:
            Shape [N], in [0, inf].

        Guarantee:
            None to an adaptive run as a whole: it describes what happened. `active` and `odometer_epsilon` bound.

        Raises:
            ParameterError: delta or an index out of range.
        """
        delta = arguments.delta(delta)
        t = np.array(self._orders) - 1
        # epsilon - budget(epsilon) is what the conversion adds to the divergence.
        extra = -renyi_budget(t, 0.0, delta)
        spent = self._rows(indices)
        best = np.maximum(np.min(spent + extra, axis=1), 0.0) * (1 + 1e-12)
        return np.where(spent.max(axis=1) > 0, best, 0.0)

    def odometer_epsilon(self, delta: float, *, indices: ArrayLike | None = None) -> Array:
        """A bound on each example's privacy loss, true at all times with probability 1 - delta; private.

        Arguments, result and errors as for `epsilon`.
        """
        return time_uniform_epsilon(self._rows(indices), self._orders, arguments.delta(delta))

    def active(
        self,
        epsilon: float,
        delta: float,
        *,
        noise_multiplier: float,
        sample_rate: float,
        order: float | None = None,
        norms: ArrayLike | None = None,
        max_grad_norm: float = 1.0,
        indices: ArrayLike | None = None,
    ) -> NDArray[np.bool_]:
        """Who may take part in the next step without passing (epsilon, delta): an individual Renyi filter [1].

        Args:
            epsilon: the budget, > 0; the same at every call.
            delta: of the budget, in (0, 1); the same at every call.
            noise_multiplier: of the next step.
            sample_rate: of the next step.
            order: one of `orders`, the same at every call; by default the one at which Gaussian noise lasts longest.
                Sampled steps last longer at another: `filters.order_for_plan` finds it for a planned run.
            norms: gradient norms in the next step, shape [N], as for `step`; by default all are the clip norm.
            max_grad_norm: as for `step`.
            indices: shape [N], as for `step`.

        Returns:
            Mask, shape [size]; private. False: leave the example's gradient out of the sum, in this step at
            least, and pass norm 0 for it to `step`.

        Guarantee:
            If every step is preceded by this call, with the step's own parameters, and leaves out whom it names, the
            run is (epsilon, delta)-differentially private with respect to each example.

        Raises:
            ParameterError: another budget than at the first call, one that no order here proves, or an argument as
                for `step`.
        """
        budget = _Budget.of(self._orders, arguments.epsilon(epsilon), arguments.delta(delta), order)
        if self._budget not in (None, budget):
            raise ParameterError(
                f"the budget must be the same at every call, was {self._budget}, got {budget}. "
                "A filter keeps the budget that it started with: make another accountant."
            )
        if norms is None:
            at = np.full(self._size, len(self._levels) - 1)
        else:
            at = self._levels_of(norms, indices, max_grad_norm)
        cost = self._table(noise_multiplier, sample_rate)[at, budget.at]
        self._budget = budget
        after = (self._spent[:, budget.at] + cost) * self._rounding_up()
        allowed: NDArray[np.bool_] = (cost == 0) | (after <= budget.divergence)
        return allowed

    def _levels_of(self, norms: ArrayLike, indices: ArrayLike | None, max_grad_norm: float) -> NDArray[np.intp]:
        """Which level each example's norm is rounded up to, shape [size]."""
        clip = arguments.real("max_grad_norm", max_grad_norm, remedy="Give the clip norm, for example 1.0.")
        if not 0 < clip < math.inf:
            raise ParameterError(f"max_grad_norm must be > 0 and finite, got {clip!r}. Give the clip norm.")
        remedy = "Give one L2 norm for each example."
        given = arguments.reals("norms", norms, remedy=remedy, nan_allowed=True)
        whose = self._indices(indices)
        wanted = self._size if whose is None else len(whose)
        if given.shape != (wanted,):
            raise ParameterError(
                f"norms must have shape [{wanted}], one for each index, got {list(given.shape)}. "
                "Give indices when only some are known."
            )
        if np.any(given < 0):
            raise ParameterError(f"norms must be >= 0, got {float(given[given < 0][0])!r}.")
        share = np.where(np.isfinite(given), np.minimum(np.nextafter(given / clip, math.inf), 1.0), 1.0)
        share = np.where(given == 0, 0.0, share)
        found = np.searchsorted(self._levels, share)  # the first level that is not below
        if whose is None:
            return found
        at = np.full(self._size, len(self._levels) - 1)
        at[whose] = found
        return at

    def _indices(self, indices: ArrayLike | None) -> NDArray[np.intp] | None:
        if indices is None:
            return None
        remedy = "Give a list of ints, for example [0, 3]."
        arguments.reals("indices", indices, remedy=remedy)
        given = np.asarray(indices)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise ParameterError(f"indices must be a list of ints, got {arguments.shown(indices)}. {remedy}")
        whose = given.astype(np.intp)
        if whose.size and (whose.min() < 0 or whose.max() >= self._size):
            raise ParameterError(
                f"indices must be from 0 to {self._size - 1}, got {whose.min()} to {whose.max()}. Check the size."
            )
        if len(np.unique(whose)) < len(whose):
            raise ParameterError("indices must name each example at most once: one step charges an example once.")
        return whose

    def _rows(self, indices: ArrayLike | None) -> Array:
        whose = self._indices(indices)
        return (self._spent if whose is None else self._spent[whose]) * self._rounding_up()

    def _rounding_up(self) -> float:
        """Covers one rounding a step, each at most 2^-53 of a sum that only grows."""
        return 1 + (self._steps + 4) * 2.0**-52

    def _table(self, noise_multiplier: float, sample_rate: float) -> Array:
        sigma, rate = arguments.noise_scale("noise_multiplier", noise_multiplier), arguments.sample_rate(sample_rate)
        return _divergences(sigma, rate, self._orders, self._relation, tuple(self._levels.tolist()))


@functools.lru_cache(maxsize=4)
def _divergences(
    sigma: float, rate: float, orders: tuple[float, ...], relation: NeighboringRelation, levels: tuple[float, ...]
) -> Array:
    """Renyi divergence of one step at each level of the norm, shape [levels, K]; shared, so read-only."""
    table = np.zeros((len(levels), len(orders)))
    for row, level in enumerate(levels[1:], start=1):
        table[row] = rdp(PoissonSampled(rate, Gaussian(sigma / level)), orders, relation=relation)
    table.flags.writeable = False
    return table


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Budget:
    """What every example may spend, and at which of the orders it is counted."""

    epsilon: float
    delta: float
    at: int
    divergence: float

    @classmethod
    def of(cls, orders: tuple[float, ...], epsilon: float, delta: float, order: float | None) -> _Budget:
        if epsilon == 0:
            raise ParameterError("epsilon must be > 0, got 0. A filter needs something to spend, for example 1.0.")
        t = np.array(orders) - 1
        divergences = renyi_budget(t, epsilon, delta)
        if order is None:
            at = int(np.argmax(divergences / (1 + t)))  # at order a, Gaussian noise costs a times its rho
        elif order in orders:
            at = orders.index(order)
        else:
            raise ParameterError(f"order must be one of the accountant's {orders}, got {order!r}.")
        if not divergences[at] > 0:
            raise ParameterError(
                f"order {orders[at]!r} proves no epsilon as small as {epsilon!r} at delta {delta!r}, however little is "
                f"spent. Give orders around {order_for_budget(epsilon, delta):.4g}."
            )
        return cls(epsilon=epsilon, delta=delta, at=at, divergence=float(divergences[at]) * (1 - 1e-12))
