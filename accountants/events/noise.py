"""One noisy answer, each example's share of it bounded."""

from __future__ import annotations

import dataclasses

from accountants import arguments
from accountants.events.event import Event


@dataclasses.dataclass(frozen=True)
class Gaussian(Event, kind="gaussian"):
    """f(x) + N(0, noise_multiplier^2 I), where f moves by at most 1 in L2 norm.

    The unit is the clip norm: noise_multiplier = noise std / clip norm, for every neighbouring relation.
    Under add/remove and zero-out, the mechanism is dominated by the pair N(0, s^2), N(1, s^2); under replacement
    by N(0, s^2), N(2, s^2).

    Args:
        noise_multiplier: s >= 0, finite; 0 releases f(x) itself, and epsilon is infinite.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", arguments.noise_scale("noise_multiplier", self.noise_multiplier))


@dataclasses.dataclass(frozen=True)
class Laplace(Event, kind="laplace"):
    """f(x) + Laplace noise of scale `scale` (density exp(-|z| / scale) / (2 scale)), f real with sensitivity 1.

    Dominated by the pair Lap(0, b), Lap(1, b) under add/remove and zero-out, Lap(0, b), Lap(2, b) under
    replacement. One release is (1 / b)-differentially private with delta = 0 under add/remove.

    Args:
        scale: b >= 0, finite, in units of the sensitivity; 0 releases f(x) itself, and epsilon is infinite.
    """

    scale: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", arguments.noise_scale("scale", self.scale))
