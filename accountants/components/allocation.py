"""One Gaussian step out of T, the step drawn at random for each example: random allocation, balls into bins.

Others' bins are fixed and revealed. With the example, its bin i is uniform and step i's answer is moved by some vector
x_i, ||x_i|| <= 1, that may depend on earlier answers; without it, no step is. From z drawn from N(e_i, s^2 I) for a
random i, or from N(0, s^2 I), in T dimensions the answers can be made: step j's is z_j along x_j, with independent
noise across it (and z_j ||x_j|| plus noise of variance s^2 (1 - ||x_j||^2) if x_j is shorter). Making them is
post-processing, so

    P = (1 / T) sum_i N(e_i, s^2 I),    Q = N(0, s^2 I)

dominates [1], and neighbours whose x_j are all of norm 1 attain it.

References:
    [1] Chua et al., Balls-and-Bins Sampling for DP-SGD, 2024. arXiv:2412.16802
"""

from __future__ import annotations

import dataclasses
import functools
import math

from accountants.components import allocation_moments
from accountants.components.allocation_law import ratio_law
from accountants.components.atoms import Atoms
from accountants.components.component import Array, Component, Direction, LossPair
from accountants.components.sampled_noise import SampledNoise

_LEAST_SCALE = 0.05  # below, masses of Q underflow; the pair of one Gaussian step is close


@dataclasses.dataclass(frozen=True)
class Allocation(Component):
    """Gaussian noise on T sums, of which one, at random, has the example in it.

    Attributes:
        scale: s > 0, standard deviation over the sensitivity.
        bins: T >= 2.
    """

    scale: float
    bins: int

    def pair(self, direction: Direction) -> LossPair:
        """The numerical law from above; that of one Gaussian step where noise is minute."""
        if self.scale < _LEAST_SCALE:
            return SampledNoise("gaussian", self.scale, 1.0).pair(direction)
        return AllocationPair(self, direction, dominating=True)

    def witness(self, direction: Direction) -> LossPair | None:
        """The numerical law from below."""
        if self.scale < _LEAST_SCALE:
            return None
        return AllocationPair(self, direction, dominating=False)

    def log_moments(self, direction: Direction, t: Array) -> Array:
        """Exact at integer orders, chords between them."""
        return allocation_moments.log_moments(self.scale, self.bins, direction, t)


@dataclasses.dataclass(frozen=True)
class AllocationPair(LossPair):
    """A finite pair that dominates the component's, or is dominated by it; see `allocation_law`."""

    component: Allocation
    direction: Direction
    dominating: bool

    @property
    def support(self) -> tuple[float, float]:
        """Unbounded: the outermost of the finitely many losses carry next to nothing."""
        return -math.inf, math.inf

    def tails(self, mass: float) -> tuple[float, float]:
        """Quantiles of the finite losses."""
        return self._atoms.tails(mass)

    def cells(self, levels: Array) -> tuple[Array, Array]:
        """Half-open cells [low, high)."""
        return self._atoms.cells(levels, most=math.inf)

    @functools.cached_property
    def _atoms(self) -> Atoms:
        law = ratio_law(self.component.scale, self.component.bins, dominating=self.dominating)
        return law.atoms(self.direction)
