"""The best test an attacker can run: type II error against type I error, bounded from below.

Each proven (epsilon, delta) forbids tests below two lines [1, Proposition 2.5]:

    beta >= max(0, 1 - delta - e^eps alpha, e^-eps (1 - delta - alpha));

the bound is their upper envelope over points of the privacy curve. Un-sampled Gaussians have a closed form.

References:
    [1] Dong, Roth, Su, Gaussian Differential Privacy, 2019. arXiv:1905.02383
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from accountants import arguments
from accountants.accountant import Accountant
from accountants.errors import ParameterError
from accountants.events import Event
from accountants.normal_form import normal_form
from accountants.queries import AccountantName, new_accountant
from accountants.relation import NeighboringRelation
from accountants.renyi import Array

_ROUNDING = 1e-14  # of numbers at most 1, and of e^epsilon alpha where that is at most 1
_SHARES = np.geomspace(0.8, 1e-6, 16)  # of the total variation: deltas at which the curve is touched


def trade_off(
    event: Event,
    alpha: ArrayLike,
    *,
    accountant: AccountantName | str = "prv",
    relation: NeighboringRelation | str = NeighboringRelation.ADD_OR_REMOVE,
) -> Array:
    """Lower bound on the type II error of any test between neighbours whose type I error is alpha.

    Args:
        event: what was released.
        alpha: type I errors (false positive rates of a membership attack), in [0, 1], any shape.
        accountant: which one bounds the privacy curve.
        relation: the neighbouring relation.

    Returns:
        beta, same shape, in [0, 1 - alpha]; 1 - beta bounds the attack's true positive rate from above.

    Guarantee:
        No test has type I error alpha and type II error below beta, whichever neighbour is the null hypothesis.

    Raises:
        ParameterError: an alpha outside [0, 1], an unknown accountant or relation.
        UnsupportedEventError: the accountant has no proof for this event.

    Example:
        >>> from accountants.events import Gaussian
        >>> trade_off(Gaussian(1.0), [0.05, 0.5]).round(4)
        array([0.7405, 0.1587])
    """
    false_positive = np.asarray(alpha, dtype=np.float64)
    if not np.all((false_positive >= 0) & (false_positive <= 1)):
        raise ParameterError(f"alpha must be in [0, 1], got {alpha!r}. Give false positive rates such as [0.01, 0.1].")
    spent = new_accountant(accountant, relation=relation).compose(event)
    form = normal_form(event, spent.relation)
    if form.gaussian_mu is not None and not form.unbounded:
        beta: Array = special.ndtr(-special.ndtri(false_positive) - form.gaussian_mu) * (1 - _ROUNDING)
    else:
        beta = np.zeros(false_positive.shape)
        for epsilon, delta in _proven(spent):
            beta = np.maximum(beta, 1 - delta - math.exp(epsilon) * false_positive)
            beta = np.maximum(beta, math.exp(-epsilon) * (1 - delta - false_positive))
    return np.minimum(np.maximum(beta - _ROUNDING, 0.0), 1 - false_positive)


def _proven(spent: Accountant) -> list[tuple[float, float]]:
    """Points (epsilon, delta) of the privacy curve from delta(0) down, finite ones only."""
    total_variation = spent.delta(0.0)
    points = [(0.0, total_variation)]
    for share in _SHARES:
        delta = arguments.delta(max(float(share) * total_variation, 1e-300))
        points.append((spent.epsilon(delta), delta))
    return [(epsilon, delta) for epsilon, delta in points if epsilon < 690]
