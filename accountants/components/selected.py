"""Publishing the best of several runs, how many drawn at random: known by its Renyi curve only."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

import numpy as np

from accountants.components.component import DIRECTIONS, Array, Component, Direction
from accountants.tuning import Repetitions


@dataclasses.dataclass(frozen=True)
class Selected(Component):
    """The best of K runs, each the composition of `inner`; `accountants.tuning` has the curve.

    Attributes:
        inner: components of one run with their counts.
        repetitions: the law of K.
    """

    inner: tuple[tuple[Component, int], ...]
    repetitions: Repetitions

    @staticmethod
    def of(inner: Iterable[tuple[Component | None, int]], repetitions: Repetitions) -> Selected | None:
        """The best of runs that consist of `inner`; None if one of those, None itself, reveals its data."""
        counts: Counter[Component] = Counter()
        for component, count in inner:
            if component is None and count:
                return None
            if component is not None and count:
                counts[component] += count
        return Selected(tuple(counts.items()), repetitions)

    def pair(self, direction: Direction) -> None:
        """None."""
        return None

    def log_moments(self, direction: Direction, t: Array) -> Array:
        """t times the curve at order 1 + t, the order rounded up; alike in both directions."""
        t = np.asarray(t, dtype=np.float64)
        moments: Array = t * self.repetitions.rdp(self._one_run, np.nextafter(1 + t, np.inf))
        return moments

    def _one_run(self, orders: Array) -> Array:
        """Renyi divergence of one run, the larger of both directions."""
        t = orders - 1
        moments = np.zeros((len(DIRECTIONS), len(t)))
        for component, count in self.inner:
            moments += [count * component.log_moments(direction, t) for direction in DIRECTIONS]
        curve: Array = moments.max(axis=0) / t
        return curve
