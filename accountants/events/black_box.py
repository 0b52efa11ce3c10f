"""Mechanisms of which only a guarantee is known: its parameters are trusted as given.

Each guarantee is stated for the neighbouring relation under which it is accounted.
"""

from __future__ import annotations

import dataclasses

from accountants import arguments
from accountants.events.event import Event


@dataclasses.dataclass(frozen=True)
class EpsilonDelta(Event, kind="epsilon_delta"):
    """Any (epsilon, delta)-differentially private mechanism, pure where delta is 0.

    Dominated by the worst such pair [1]: with probability delta it tells which data set it was, else it answers
    one of two ways, e^epsilon apart. Poisson sampling under add/remove mixes that pair; a group of k has
    (k epsilon, delta (e^(k epsilon) - 1) / (e^epsilon - 1)).

    Args:
        epsilon: >= 0, finite.
        delta: in [0, 1].

    References:
        [1] Kairouz, Oh, Viswanath, The Composition Theorem for Differential Privacy, 2015. arXiv:1311.0776
    """

    epsilon: float
    delta: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", arguments.epsilon(self.epsilon))
        remedy = "Give the delta that the mechanism's guarantee states, 0 if it is pure."
        object.__setattr__(self, "delta", arguments.probability("delta", self.delta, remedy=remedy))


@dataclasses.dataclass(frozen=True)
class ZCDP(Event, kind="zcdp"):
    """Any mechanism with (xi, rho)-zero-concentrated differential privacy [1, Definition 1.1].

    Its Renyi divergence at every order a > 1 is at most xi + rho * a, either way. A group of k has k^2 rho where xi is
    0 [1, Proposition 1.9]. Nothing is known of it under sampling.

    Args:
        rho: >= 0, finite; 1 / (2 s^2) for Gaussian noise of multiplier s.
        xi: >= 0, finite.

    References:
        [1] Bun, Steinke, Concentrated Differential Privacy: Simplifications, Extensions, and Lower Bounds, 2016.
            arXiv:1605.02065
    """

    rho: float
    xi: float = 0.0

    def __post_init__(self) -> None:
        remedy = "Give the parameters of the mechanism's concentrated guarantee, for example ZCDP(0.5)."
        object.__setattr__(self, "rho", arguments.non_negative("rho", self.rho, remedy=remedy))
        object.__setattr__(self, "xi", arguments.non_negative("xi", self.xi, remedy=remedy))
