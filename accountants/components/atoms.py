"""A pair of laws on countably many outcomes: point masses sorted by their privacy loss."""

from __future__ import annotations

import dataclasses

import numpy as np

from accountants.components.component import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Atoms:
    """Outcomes of P and Q in the order of their loss.

    Attributes:
        losses: non-decreasing and finite, shape [N].
        p: P's mass at each, shape [N].
        q: Q's mass at each, shape [N].
        infinite: P's mass where Q has none.
    """

    losses: Array
    p: Array
    q: Array
    infinite: float = 0.0

    def cells(self, levels: Array, *, most: float) -> tuple[Array, Array]:
        """Masses of P and Q between consecutive levels, shape [B] each.

        Cells are [low, high), except that losses at `most`, the top of the support, belong to the cell that ends
        there. Each sum is pairwise, so its error is a few roundings whatever the number of atoms.
        """
        cuts = np.searchsorted(self.losses, levels)
        cuts[levels >= most] = len(self.losses)
        p, q = _sums(self.p, cuts), _sums(self.q, cuts)
        if levels[-1] == np.inf:
            p[-1] += self.infinite
        return p, q

    def tails(self, mass: float) -> tuple[float, float]:
        """(low, high): P puts at most `mass` on finite losses below low, and at most `mass` above high."""
        last = len(self.losses) - 1
        low = min(int(np.searchsorted(np.cumsum(self.p), mass, side="right")), last)
        high = min(int(np.searchsorted(np.cumsum(self.p[::-1]), mass, side="right")), last)
        return float(self.losses[low]), float(self.losses[last - high])


def _sums(masses: Array, cuts: np.ndarray) -> Array:
    """Sum of masses between consecutive cuts."""
    padded = np.append(masses, 0.0)
    sums: Array = np.add.reduceat(padded, np.minimum(cuts, len(masses)))[:-1]
    return np.where(np.diff(cuts) > 0, sums, 0.0)
