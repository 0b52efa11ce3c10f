"""A rough but cheap model of a composition, to place windows by: it affects tightness, never soundness.

Each component's law, its far tails cut off as the certificate will cut them, on cells that grow in proportion to the
loss. What is cut decides how far an exponential tilt can go: the moments of the uncut law explode where rare, large
losses dominate, those of the cut law do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from accountants.components.component import Array, LossPair
from accountants.engines.lattice import dominating
from accountants.engines.renyi_bound import epsilon_proved, log_delta_proved

_RESOLUTION = 1e-9  # of the largest loss
_MOST_MODELLED = 16  # components; of more, one stands for its neighbours


class Sketch:
    """Log moments of a composition with its tails cut.

    Args:
        parts: the pairs of the composition with their counts, in an order that puts like next to like.
        tail_mass: P-mass cut off each side of one step's loss.
    """

    def __init__(self, parts: Sequence[tuple[LossPair, int]], tail_mass: float) -> None:
        self._parts: list[tuple[int, Array, Array]] = []
        for group in _groups(parts):
            pair = group[len(group) // 2][0]
            reach = max(map(abs, pair.tails(tail_mass))) or 1.0
            law = dominating(pair, reach * _RESOLUTION, (0.0, 0.0), tail_mass)
            self._parts.append((sum(count for _, count in group), law.losses, np.log(law.mass)))

    def log_moments(self, t: Array) -> Array:
        """log E exp(t * total loss), losses that were cut left out; shape [M]."""
        total = np.zeros(len(t))
        for count, losses, log_mass in self._parts:
            exponents = np.multiply.outer(t, losses) + log_mass
            top = exponents.max(axis=1)
            total += count * (top + np.log(np.exp(exponents - top[:, None]).sum(axis=1)))
        return total

    def epsilon_score(self, t: Array, delta: float) -> Array:
        """The epsilon that moment t would prove at delta."""
        return epsilon_proved(self.log_moments(t), t, math.log(delta))

    def log_delta_score(self, t: Array, epsilon: float) -> Array:
        """The log delta that moment t would prove at epsilon."""
        return log_delta_proved(self.log_moments(t), t, epsilon)


def _groups(parts: Sequence[tuple[LossPair, int]]) -> list[Sequence[tuple[LossPair, int]]]:
    """The parts in at most _MOST_MODELLED runs of neighbours."""
    size = math.ceil(len(parts) / _MOST_MODELLED)
    return [parts[start : start + size] for start in range(0, len(parts), size)]
