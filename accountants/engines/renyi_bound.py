"""Bounds from moments of the privacy loss: of order 1 + t, from log E e^(t L), by the tightest known conversion.

References:
    [1] Canonne, Kamath, Steinke, The Discrete Gaussian for Differential Privacy, 2020. arXiv:2004.00010
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from accountants.best_moment import best_moment
from accountants.components.component import DIRECTIONS, Array, Direction
from accountants.reduction.normal_form import NormalForm

ROUNDING = 1e-13  # relative, on top of the moments' own slack
LEAST_DELTA = 1e-300  # what a delta that underflows is rounded up to


def epsilon_proved(log_moments: Array, t: Array | float, log_delta: float) -> Array:
    """The epsilon that log E e^(t L) proves at delta, for each t [1, Proposition 12]."""
    epsilon: Array = (log_moments - log_delta - np.log1p(t)) / t - np.log1p(1 / t)
    return epsilon


def log_delta_proved(log_moments: Array, t: Array | float, epsilon: float) -> Array:
    """The log delta that log E e^(t L) proves at epsilon: (1 - e^(e - l))+ <= e^(t (l - e)) t^t / (1 + t)^(1 + t)."""
    log_delta: Array = log_moments - t * epsilon - t * np.log1p(1 / t) - np.log1p(t)
    return log_delta


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
        return epsilon_proved(moments, t, log_delta)

    return scores


def log_delta_score(form: NormalForm, directions: Sequence[Direction], epsilon: float) -> Callable[[Array], Array]:
    """t -> the log delta that order 1 + t proves at `epsilon`."""

    def scores(t: Array) -> Array:
        moments = np.max([composed_log_moments(form, direction, t) for direction in directions], axis=0)
        return log_delta_proved(moments, t, epsilon)

    return scores


def epsilon_upper(form: NormalForm, delta: float) -> float:
    """Epsilon by the best order, both directions, rounded up."""
    _, value = best_moment(epsilon_score(form, DIRECTIONS, delta))
    if math.isnan(value):
        return math.inf
    return max(0.0, value + ROUNDING * (1 + abs(value)) if value > 0 else 0.0)


def delta_upper(form: NormalForm, epsilon: float) -> float:
    """Delta by the best order, both directions, rounded up, at most 1."""
    _, value = best_moment(log_delta_score(form, DIRECTIONS, epsilon))
    if math.isnan(value):
        return 1.0
    return min(1.0, max(math.exp(min(value, 0.0)) * (1 + ROUNDING * (1 + abs(value))), LEAST_DELTA))
