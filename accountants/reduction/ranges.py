"""The range in which mechanisms are computed; what lies outside is replaced by a less private one inside.

Events hold what the caller said. Their components hold parameters that every engine can work with:

    noise below a millionth of the distance of neighbours    no noise: epsilon is infinite
    noise above a billion times it                           a billion times it
    a Poisson rate below 1e-12                               1e-12
    a guarantee's epsilon above 1e6, rho above 1e12          no guarantee
    a guarantee's epsilon below 1e-9, but not 0              1e-9

Each replacement gives the adversary more, so upper bounds hold; neighbours do not attain it, so it has no witness and
adds nothing to lower bounds.
"""

from __future__ import annotations

from accountants.components.component import Component
from accountants.components.labelled import Labelled
from accountants.errors import UnsupportedEventError

LEAST_SCALE, MOST_SCALE = 1e-6, 1e9  # of noise, over the distance of neighbours
LEAST_RATE = 1e-12
LEAST_EPSILON, MOST_EPSILON, MOST_RHO = 1e-9, 1e6, 1e12
MOST_PARTS = 1024  # shifts in one mixture: members of a group that may be drawn


def scale_within(scale: float, distance: float) -> float:
    """The noise to compute with where neighbours are `distance` apart; 0 for none."""
    if scale < LEAST_SCALE * distance:
        return 0.0
    return min(scale, MOST_SCALE * distance)


def rate_within(rate: float) -> float:
    """The Poisson rate > 0 to compute with."""
    return max(rate, LEAST_RATE)


def unattained(component: Component) -> Component:
    """The same for upper bounds, unknown to lower ones."""
    return Labelled(((1.0, component),), attained=None)


def refuse_large_group(size: int) -> None:
    """Refuse a group whose drawn members make too long a mixture."""
    if size > MOST_PARTS:
        raise UnsupportedEventError(
            f"a sampled group of {size} is more than the {MOST_PARTS} that are computed. Account it un-sampled, which "
            "covers any sample, or smaller groups."
        )
