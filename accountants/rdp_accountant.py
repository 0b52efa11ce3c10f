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

import numpy as np
from numpy.typing import ArrayLike

from accountants import arguments
from accountants.accountant import Accountant
from accountants.components.component import DIRECTIONS, Array
from accountants.engines import renyi_bound
from accountants.events import Event
from accountants.interval import Interval
from accountants.reduction.normal_form import NormalForm, normal_form
from accountants.relation import NeighboringRelation


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

    References:
        Mironov, Talwar, Zhang, 2019. arXiv:1908.10530, of sampled Gaussians.
    """
    alpha = arguments.orders(orders)
    form = normal_form(event, NeighboringRelation.of(relation))
    if form.unbounded:
        return np.full(alpha.shape, math.inf)
    flat = alpha.ravel() - 1
    if not form.counts or not flat.size:
        return np.zeros(alpha.shape)
    moments = np.maximum(*(renyi_bound.composed_log_moments(form, direction, flat) for direction in DIRECTIONS))
    return (moments / flat).reshape(alpha.shape)


class RDPAccountant(Accountant):
    """Renyi accounting. Its upper bounds are sound; it proves no lower bound, so `interval().lower` is 0.

    References:
        Mironov, Renyi Differential Privacy, 2017. arXiv:1702.07476; Mironov, Talwar, Zhang, Renyi Differential Privacy
        of the Sampled Gaussian Mechanism, 2019. arXiv:1908.10530
    """

    def _epsilon_interval(self, form: NormalForm, delta: float) -> Interval:
        return Interval(0.0, renyi_bound.epsilon_upper(form, delta))

    def _delta_interval(self, form: NormalForm, epsilon: float) -> Interval:
        return Interval(0.0, renyi_bound.delta_upper(form, epsilon))
