"""A running bound on what was spent, true at every moment at once, whatever the analyst chooses next and when to stop.

Let L_t be the privacy loss after t mechanisms, under the data set that the outputs are drawn from, and R_t(a) the sum
of their Renyi divergences of order a, each given the past that led to choosing it. Then, with a > 1,

    M_t(a) = exp((a - 1) (L_t - R_t(a)))

is a nonnegative supermartingale that starts at 1: given the past, a step multiplies it by exp((a - 1) times its loss),
of mean at most exp((a - 1) times its divergence), which is what R_t grows by. So is any average over orders fixed in
advance, with weights w_k that add up to 1, and Ville's inequality says of it

    P(there is a t with sum_k w_k M_t(a_k) >= 1/delta) <= delta.

The sum grows with L_t: outside that event L_t < epsilon_t at every t, where epsilon_t solves

    sum_k w_k exp((a_k - 1) (epsilon_t - R_t(a_k))) = 1/delta.

That is at most min_k R_t(a_k) + log(1 / (w_k delta)) / (a_k - 1), which is what a share w_k delta for each order
alone would prove [1]: a term of the sum is at most the sum.

Both directions: the argument holds for the data set with the unit and for the one without, each under its own law, as
R_t is the larger of the two divergences. Differential privacy asks for each separately, so delta is not halved.

From the loss to (epsilon, delta): stop at any time of your choosing, and let A be a set of outcomes that all show
epsilon_t <= epsilon. Then P(A) <= P(A and L <= epsilon) + P(L > epsilon_t) <= e^epsilon Q(A) + delta.

Example:
    >>> from accountants.events import Gaussian, PoissonSampled
    >>> odometer = PrivacyOdometer(delta=1e-5)
    >>> for noise_multiplier in (1.0, 2.0, 1.5):  # each chosen after looking at the model so far
    ...     odometer = odometer.compose(PoissonSampled(0.01, Gaussian(noise_multiplier)), count=300)
    ...     print(round(odometer.epsilon(), 2))
    2.38
    2.42
    2.49

References:
    [1] Lecuyer, Practical Privacy Filters and Odometers with Renyi Differential Privacy, 2021. arXiv:2103.01379
    [2] Whitehouse, Ramdas, Rogers, Wu, Fully-Adaptive Composition in Differential Privacy, 2023. arXiv:2203.05481
    [3] Feldman, Zrnic, Individual Privacy Accounting via a Renyi Filter, 2021. arXiv:2008.11193
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from accountants import arguments
from accountants.adaptive.filters import check_state
from accountants.components.component import Array
from accountants.errors import ParameterError
from accountants.events import Event, Repeated
from accountants.rdp_accountant import rdp
from accountants.relation import NeighboringRelation

SCHEMA_VERSION = 1

# Orders 1 + t, t from 1/4 to 512, 13 % apart. At delta 1e-5 they serve epsilons from 0.05 to 100; the conversion at the
# best of them is within 1 % of that at the best order in a long run, within 8 % in 100 steps at rate 0.01.
DEFAULT_ORDERS = tuple(float(1 + t) for t in np.geomspace(0.25, 512.0, 64))


class PrivacyOdometer:
    """Follows a fully adaptive run; `epsilon()` may be read, published and acted on at any time.

    Args:
        delta: of every reading, in (0, 1): the chance that the loss is ever above its reading.
        orders: Renyi orders > 1, fixed in advance; the default serves epsilons from 0.05 to 100. K orders
            cost less than a factor of K in delta.
        relation: the neighbouring relation.

    Guarantee:
        See the module: with probability 1 - delta the privacy loss is below the reading at all times at once, in each
        direction; a run stopped at a time chosen from its outputs, on outcomes that show at most epsilon, is
        (epsilon, delta)-differentially private. Readings never fall.

    Raises:
        ParameterError: an argument out of range.

    References:
        Lecuyer, 2021. arXiv:2103.01379; Whitehouse et al., 2023. arXiv:2203.05481 (the module has both).
    """

    def __init__(
        self,
        *,
        delta: float,
        orders: Sequence[float] | None = None,
        relation: NeighboringRelation | str = NeighboringRelation.ADD_OR_REMOVE,
    ) -> None:
        self._delta = arguments.delta(delta)
        self._relation = NeighboringRelation.of(relation)
        self._orders = valid_orders(orders)
        self._spent = np.zeros(len(self._orders))

    @property
    def orders(self) -> tuple[float, ...]:
        """The Renyi orders, fixed when the odometer was made."""
        return self._orders

    @property
    def spent(self) -> Array:
        """Renyi divergence so far at each order, rounded up, shape [K]."""
        return self._spent.copy()

    def compose(self, event: Event, count: int = 1) -> Self:
        """Add `count` runs of `event`, chosen from whatever was seen before; returns the odometer itself.

        Raises:
            ParameterError: not an event, or a count that is not an int >= 0.
            UnsupportedEventError: no proof for this event under this relation; nothing is added.
        """
        runs = Repeated(event, arguments.steps(count, "count"))
        if runs.count:
            cost = _divergences(runs.event, self._orders, self._relation) * runs.count
            self._spent = np.where(cost > 0, add_up(self._spent, np.nextafter(cost, math.inf)), self._spent)
        return self

    def epsilon(self) -> float:
        """The bound on the privacy loss so far, in [0, inf]; 0 before anything was composed."""
        return float(time_uniform_epsilon(self._spent, self._orders, self._delta))

    def state_dict(self) -> dict[str, Any]:
        """The odometer as plain values that JSON keeps exactly; infinite spending needs JSON's Infinity."""
        return {**self._identity(), "spent": self._spent.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what an odometer with the same delta, orders and relation had spent, from its `state_dict`.

        Raises:
            ParameterError: other arguments, a missing or unknown field, or less spent at some order than here.
        """
        check_state(state, self._identity(), extra=("spent",), owner="PrivacyOdometer")
        remedy = "Load what state_dict returned."
        values = state["spent"]
        if not isinstance(values, list) or len(values) != len(self._orders):
            raise ParameterError(f"spent must be a list of {len(self._orders)} numbers, got {values!r}. {remedy}")
        spent = np.array([arguments.real("spent", value, remedy=remedy) for value in values])
        if np.any(spent < self._spent):
            raise ParameterError(
                "spent is below what this odometer has already seen, at some order. A loaded state cannot lower what "
                "was spent: start from the latest state."
            )
        self._spent = spent

    def _identity(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "delta": self._delta,
            "orders": list(self._orders),
            "relation": self._relation.value,
        }


def time_uniform_epsilon(spent: Array, orders: Sequence[float], delta: float) -> Array:
    """The epsilon of the module's docstring, for each row of Renyi divergences, equal weights.

    Args:
        spent: Renyi divergences at each order, >= 0, shape [..., K].
        orders: Renyi orders > 1, length K.
        delta: in (0, 1).

    Returns:
        Upper bounds, rounded up, shape [...]; 0 where nothing was spent, inf where all of the row is.

    Example:
        >>> time_uniform_epsilon(np.array([[0.0, 0.0], [0.5, 1.0]]), [2.0, 3.0], 1e-3).round(4)
        array([0.   , 4.782])
    """
    t = np.asarray(orders) - 1
    allowance = math.log(len(t)) - math.log(delta)  # log of 1 / (w delta)
    epsilon: Array = np.min(spent + allowance / t, axis=-1)
    finite = np.isfinite(epsilon)
    epsilon, rows = np.where(finite, epsilon, 0.0), np.where(finite[..., None], spent, 0.0)
    # log sum exp is convex and grows with epsilon: from a bound above the root, Newton's steps stay above it.
    for _ in range(8):
        exponents = t * (epsilon[..., None] - rows)
        top = exponents.max(axis=-1, keepdims=True)
        terms = np.exp(exponents - top)
        total = terms.sum(axis=-1)
        excess = top[..., 0] + np.log(total) - allowance
        epsilon = epsilon - np.maximum(excess, 0.0) * total / (terms @ t)
    epsilon = epsilon * (1 + 1e-12) + 1e-15
    return np.where(finite, np.where(spent.max(axis=-1) > 0, epsilon, 0.0), math.inf)


def add_up(spent: Array, cost: Array) -> Array:
    """spent + cost, rounded up."""
    total: Array = np.nextafter(spent + cost, math.inf)
    return total


def valid_orders(orders: ArrayLike | None) -> tuple[float, ...]:
    """Distinct increasing orders > 1; the default ones for None.

    Raises:
        ParameterError: an order that is not above 1 and finite, a repeated one, or none.
    """
    if orders is None:
        return DEFAULT_ORDERS
    values = arguments.orders(orders)
    if values.ndim != 1 or not len(values):
        raise ParameterError(f"orders must be a list of numbers, got {arguments.shown(orders)}. Give [2, 8, 32].")
    if len(np.unique(values)) < len(values):
        raise ParameterError(
            f"orders must differ from each other, got {arguments.shown(orders)}. Leave repeated ones out."
        )
    return tuple(sorted(float(value) for value in values))


@functools.lru_cache(maxsize=256)
def _divergences(event: Event, orders: tuple[float, ...], relation: NeighboringRelation) -> Array:
    """Renyi divergence of one event at each order, shape [K]; shared, so read-only."""
    divergences = rdp(event, orders, relation=relation)
    divergences.flags.writeable = False
    return divergences
