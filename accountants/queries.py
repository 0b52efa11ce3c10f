"""The questions that a DP-SGD run asks: steps noisy sums of Poisson-sampled, clipped gradients.

Every argument is by keyword. `epsilon` and `delta` are upper bounds; `interval` gives both sides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from accountants import arguments
from accountants.accountant import Accountant
from accountants.components.component import Array
from accountants.errors import ParameterError
from accountants.events import Event, Gaussian, PoissonSampled, Repeated
from accountants.gdp_accountant import GDPAccountant
from accountants.interval import Interval
from accountants.prv_accountant import PRVAccountant
from accountants.rdp_accountant import RDPAccountant
from accountants.relation import NeighboringRelation
from accountants.zcdp_accountant import ZCDPAccountant

AccountantName = Literal["prv", "rdp", "zcdp", "gdp", "prv-accountant"]
_ACCOUNTANTS: dict[str, Callable[..., Accountant]] = {
    "prv": PRVAccountant,
    "rdp": RDPAccountant,
    "zcdp": ZCDPAccountant,
    "gdp": GDPAccountant,
    "prv-accountant": functools.partial(PRVAccountant, engine="prv-accountant"),
}
assert set(_ACCOUNTANTS) == set(get_args(AccountantName))

_ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE


def new_accountant(
    name: AccountantName | str = "prv", *, relation: NeighboringRelation | str = _ADD_OR_REMOVE
) -> Accountant:
    """An empty accountant by name.

    Args:
        name: "prv", "rdp", "zcdp", "gdp" or "prv-accountant".
        relation: the neighbouring relation of every answer.

    Raises:
        ParameterError: no accountant, or no relation, of that name.
    """
    if not isinstance(name, str) or name not in _ACCOUNTANTS:
        names = ", ".join(repr(known) for known in _ACCOUNTANTS)
        raise ParameterError(f"accountant must be one of {names}; got {name!r}. The default, 'prv', answers most.")
    return _ACCOUNTANTS[name](relation=relation)


def dpsgd(*, noise_multiplier: float, sample_rate: float, steps: int) -> Event:
    """The event of DP-SGD: `steps` Poisson-sampled Gaussians; arguments as in `interval`.

    References:
        Abadi et al., Deep Learning with Differential Privacy, 2016. arXiv:1607.00133, Algorithm 1.
    """
    return Repeated(PoissonSampled(sample_rate, Gaussian(noise_multiplier)), arguments.steps(steps))


def interval(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: AccountantName | str = "prv",
    relation: NeighboringRelation | str = _ADD_OR_REMOVE,
) -> Interval:
    """Lower and upper bound on the tight epsilon of DP-SGD at `delta`.

    Args:
        noise_multiplier: noise std / clip norm, >= 0; 0 gives infinity.
        sample_rate: probability that an example is in a batch (Poisson sampling), in [0, 1].
        steps: noisy steps taken, an int >= 0.
        delta: in (0, 1).
        accountant: "prv" (certified, tight), "rdp" (lower bound 0), "zcdp" (lower bound 0, sample_rate 1 only),
            "gdp" (exact, sample_rate 1 only) or "prv-accountant" (the package of that name, for cross-checks).
        relation: the neighbouring relation.

    Returns:
        Interval(lower, upper), both in [0, inf].

    Guarantee:
        The run is (upper, delta)-differentially private under the relation, and not better than lower. For
        "prv-accountant", as far as that package goes: it bounds removing an example, not adding one.

    Raises:
        ParameterError: an argument out of range.
        UnsupportedEventError: the accountant has no proof for this event under this relation.

    Example:
        >>> low, high = interval(noise_multiplier=1.0, sample_rate=1.0, steps=1, delta=1e-5)
        >>> round(low, 6), round(high, 6)
        (4.377178, 4.377178)
    """
    event = dpsgd(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
    return new_accountant(accountant, relation=relation).compose(event).interval(delta)


def epsilon(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: AccountantName | str = "prv",
    relation: NeighboringRelation | str = _ADD_OR_REMOVE,
) -> float:
    """Upper bound on the epsilon of DP-SGD at `delta`; arguments as in `interval`.

    With accountant="gdp" and sampling there is no bound: the answer is an `Estimate`, a number of its own type.

    Example:
        >>> epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=0, delta=1e-5)
        0.0
    """
    event = dpsgd(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
    return new_accountant(accountant, relation=relation).compose(event).epsilon(delta)


def delta(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    epsilon: float,
    accountant: AccountantName | str = "prv",
    relation: NeighboringRelation | str = _ADD_OR_REMOVE,
) -> float:
    """Upper bound on the delta of DP-SGD, in [0, 1]; other arguments as in `interval`.

    With accountant="gdp" and sampling there is no bound: the answer is an `Estimate`.

    Args:
        epsilon: at which delta is asked for, >= 0 and finite.
    """
    event = dpsgd(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
    return new_accountant(accountant, relation=relation).compose(event).delta(epsilon)


def epsilon_curve(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: Sequence[int],
    delta: float,
    accountant: AccountantName | str = "prv",
    relation: NeighboringRelation | str = _ADD_OR_REMOVE,
) -> Array:
    """Upper bounds on epsilon after each number of steps, shape [len(steps)]; other arguments as in `interval`.

    Example:
        >>> epsilon_curve(noise_multiplier=2.0, sample_rate=1.0, steps=[0, 1, 4], delta=1e-5).round(4)
        array([0.    , 1.9931, 4.3772])
    """
    step = PoissonSampled(sample_rate, Gaussian(noise_multiplier))
    if isinstance(steps, (str, bytes)) or not isinstance(steps, Iterable):
        raise ParameterError(f"steps must be a sequence of counts, got {steps!r}. Give for example [100, 200].")
    counts = [arguments.steps(count) for count in steps]
    arguments.delta(delta)
    new_accountant(accountant, relation=relation)
    bounds = {count: _epsilon_after(step, count, delta, accountant, relation) for count in sorted(set(counts))}
    return np.array([bounds[count] for count in counts])


def _epsilon_after(
    step: Event, count: int, delta: float, accountant: str, relation: NeighboringRelation | str
) -> float:
    return new_accountant(accountant, relation=relation).compose(step, count).interval(delta).upper
