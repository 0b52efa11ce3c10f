"""The best test an attacker can run: type II error against type I error, bounded from below."""

from __future__ import annotations

import functools

from numpy.typing import ArrayLike

from accountants.accountant import Accountant
from accountants.components.component import Array
from accountants.errors import ParameterError
from accountants.events import Event
from accountants.queries import AccountantName, new_accountant
from accountants.relation import NeighboringRelation


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

    References:
        Dong, Roth, Su, Gaussian Differential Privacy, 2019. arXiv:1905.02383
    """
    return spent_by(event, accountant=accountant, relation=relation).trade_off(alpha)


def spent_by(event: Event, *, accountant: AccountantName | str, relation: NeighboringRelation | str) -> Accountant:
    """An accountant that composed `event` and nothing else; shared between calls, not to be composed further.

    Raises:
        ParameterError: not an event, an unknown accountant or relation.
        UnsupportedEventError: the accountant has no proof for this event.
    """
    if not isinstance(event, Event):
        raise ParameterError(f"event must be an Event, got {event!r}. Give accountants.dpsgd(...), or Gaussian(1.0).")
    return _shared(event, accountant, NeighboringRelation.of(relation))


@functools.lru_cache(maxsize=8)
def _shared(event: Event, accountant: str, relation: NeighboringRelation) -> Accountant:
    return new_accountant(accountant, relation=relation).compose(event)
