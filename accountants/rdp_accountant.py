"""Renyi accounting with a continuous order: fast, sound, and 5 to 40 % above the tight epsilon in training.

    epsilon(delta) = min over a > 1 of  R(a) + log(1 - 1/a) - (log delta + log a) / (a - 1)      [1, Proposition 12]

R(a) is the sum of the steps' Renyi divergences at order a, the larger of removing and adding. The minimum is taken
over a continuous order whose range grows until the minimum is inside.

Example:
    >>> from accountants.events import Gaussian, PoissonSampled
    >>> accountant = RDPAccountant().compose(PoissonSampled(0.01, Gaussian(1.0)), count=10_000)
    >>> round(accountant.epsilon(1e-5), 3)
    6.712

References:
    [1] Canonne, Kamath, Steinke, The Discrete Gaussian for Differential Privacy, 2020. arXiv:2004.00010
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from accountants.accountant import Accountant, Interval
from accountants.components.component import DIRECTIONS, Array, Direction
from accountants.engines.best_moment import best_moment
from accountants.errors import ParameterError
from accountants.events import Event
from accountants.reduction.normal_form import NormalForm, normal_form
from accountants.relation import NeighboringRelation

ROUNDING = 1e-13  # relative, on top of the moments' own slack


def rdp(
    event: Event,
    orders: ArrayLike,
    *,
    relation: NeighboringRelation | str = NeighboringRelation.ADD_OR_REMOVE,
) -> Array:
    """Renyi divergence that `event` spends at each order: an upper bound, tight to about 1e-9.

    Args:
        event: what was released.
        orders: Renyi orders > 1, integer or fractional, any shape.
        relation: the neighbouring relation.

    Returns:
        The larger of the two directions' divergences, same shape as orders.

    Raises:
        ParameterError: an order that is not above 1 and finite.
        UnsupportedEventError: no dominating pair is known under this relation.

    Example:
        >>> from accountants.events import Gaussian
        >>> rdp(Gaussian(2.0), [2.0, 3.5]).round(6)
        array([0.25  , 0.4375])
    """
    alpha = np.asarray(orders, dtype=np.float64)
    if not (np.all(np.isfinite(alpha)) and np.all(alpha > 1)):
        raise ParameterError(f"orders must be finite and > 1, got {orders!r}. Give orders such as [1.5, 2, 64].")
    form = normal_form(event, NeighboringRelation.of(relation))
    if form.unbounded:
        return np.full(alpha.shape, math.inf)
    flat = alpha.ravel() - 1
    if not form.counts or not flat.size:
        return np.zeros(alpha.shape)
    moments = np.maximum(*(composed_log_moments(form, direction, flat) for direction in DIRECTIONS))
    return (moments / flat).reshape(alpha.shape)


def composed_log_moments(form: NormalForm, direction: Direction, t: Array) -> Array:
    """log E exp(t * total privacy loss): the components' log moments, added up; shape [M]."""
    total = np.zeros(len(t))
    for component, count in form.counts:
        total += count * component.log_moments(direction, t)
    return total


def epsilon_score(form: NormalForm, directions: Sequence[Direction], delta: float) -> Callable[[Array], Array]:
    """t -> the epsilon that order 1 + t proves at `delta`."""
    log_delta = math.log(delta)

    def scores(t: Array) -> Array:
        moments = np.max([composed_log_moments(form, direction, t) for direction in directions], axis=0)
        score: Array = (moments - log_delta - np.log1p(t)) / t - np.log1p(1 / t)
        return score

    return scores


def log_delta_score(form: NormalForm, directions: Sequence[Direction], epsilon: float) -> Callable[[Array], Array]:
    """t -> the log delta that order 1 + t proves at `epsilon`."""

    def scores(t: Array) -> Array:
        moments = np.max([composed_log_moments(form, direction, t) for direction in directions], axis=0)
        score: Array = moments - t * epsilon - t * np.log1p(1 / t) - np.log1p(t)
        return score

    return scores


class RDPAccountant(Accountant):
    """Renyi accounting. Its upper bounds are sound; it proves no lower bound, so `interval().lower` is 0."""

    def _epsilon_interval(self, form: NormalForm, delta: float) -> Interval:
        return Interval(0.0, epsilon_upper(form, delta))

    def _delta_interval(self, form: NormalForm, epsilon: float) -> Interval:
        return Interval(0.0, delta_upper(form, epsilon))


def epsilon_upper(form: NormalForm, delta: float) -> float:
    """Epsilon by the best order, both directions, rounded up."""
    _, value = best_moment(epsilon_score(form, DIRECTIONS, delta))
    return max(0.0, value + ROUNDING * (1 + abs(value)) if value > 0 else 0.0)


def delta_upper(form: NormalForm, epsilon: float) -> float:
    """Delta by the best order, both directions, rounded up, at most 1."""
    _, value = best_moment(log_delta_score(form, DIRECTIONS, epsilon))
    return min(1.0, math.exp(min(value, 0.0)) * (1 + ROUNDING * (1 + abs(value))))
