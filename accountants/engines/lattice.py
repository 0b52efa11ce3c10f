"""One step's privacy loss moved onto a lattice, from above and from below.

`dominating`: within each cell [t, t'] between lattice points, P's mass is split between the two ends so that P's and
Q's masses are both kept (connect the dots, [1]). The pair it describes is at least as easy to tell apart as the true
one, alone and in composition (Blackwell's order).

`dominated`: outcomes are merged. Lattice points sit in the middle of their cells, so a merged cell's likelihood ratio
is nearly the lattice point's; a fraction of the next cell's outcomes is merged in to make it exactly so. Merging is
post-processing, so the result is at most as easy to tell apart as the truth. Where a neighbour has too little mass to
lend, the loss is rounded down instead, which is sound too.

Both are second order in the spacing, where the law is smooth.

References:
    [1] Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, Connect the Dots: Tighter Discrete Approximations of Privacy
        Loss Distributions, 2022. arXiv:2207.04380
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from accountants.components.component import Array, LossPair

Indices = NDArray[np.int64]

_TAIL_RATIO = 1.02  # ratio of neighbouring cells' distances beyond the dense part, where little mass is
_MOST_LENT = 0.5  # of a cell, to either neighbour
_LEAST_MASS = 1e-290  # below this, masses have lost digits and are not divided by
_ROUNDING = 2e-15  # relative; of a loss, and of a position on the lattice


@dataclasses.dataclass(frozen=True)
class LatticeLaw:
    """P's masses on losses origin + spacing * index; what is missing from 1 is in `infinite` or was dropped.

    Attributes:
        index: lattice positions, shape [C], repeats allowed.
        mass: P-mass at each, shape [C], > 0.
        origin: loss at index 0.
        spacing: of the lattice.
        infinite: P-mass at infinite loss.
    """

    index: Indices
    mass: Array
    origin: float
    spacing: float
    infinite: float

    @property
    def losses(self) -> Array:
        """Loss at each entry, shape [C]."""
        return self.origin + self.spacing * self.index.astype(np.float64)

    @staticmethod
    def of(index: Indices, mass: Array, origin: float, spacing: float, infinite: float) -> LatticeLaw:
        """A law without its empty entries."""
        keep = mass > 0
        return LatticeLaw(index[keep], mass[keep], origin, spacing, infinite)


def dominating(pair: LossPair, spacing: float, dense: tuple[float, float], tail_mass: float) -> LatticeLaw:
    """The law on the lattice that is at least as revealing as `pair`.

    Args:
        pair: the step.
        spacing: of the lattice, > 0.
        dense: losses in this range get every lattice point, those beyond get a geometric selection.
        tail_mass: P-mass each side that may be moved to the lowest point kept, or to infinity.
    """
    least, most = pair.support
    low, high = pair.tails(tail_mass)
    origin = least if dense[0] <= least else most if most <= dense[1] else 0.0
    first, last = math.floor((low - origin) / spacing), math.ceil((high - origin) / spacing)
    points = _selection(first, max(last, first + 1), origin, spacing, dense)
    t = _snapped(origin + spacing * points.astype(np.float64), least, most)
    p, q = pair.cells(np.concatenate([[-np.inf], t, [np.inf]]))
    below, p, q, above = float(p[0]), p[1:-1], q[1:-1], float(p[-1])
    q = np.where(q < _LEAST_MASS, 0.0, q)
    with np.errstate(over="ignore", invalid="ignore"):
        upper = (p - np.exp(t[:-1]) * q) / -np.expm1(-np.diff(t))
    upper = np.where(np.isfinite(upper), np.clip(upper, 0.0, p), p)
    mass = np.concatenate([p - upper, [0.0]])
    mass[1:] += upper
    mass[0] += below
    return LatticeLaw.of(points, mass, origin, spacing, above)


def dominated(pair: LossPair, spacing: float, dense: tuple[float, float], tail_mass: float) -> LatticeLaw:
    """The law on the lattice that is at most as revealing as `pair`; arguments as in `dominating`.

    The P-mass below the lowest point kept is dropped.
    """
    least, most = pair.support
    low, high = pair.tails(tail_mass)
    from_bottom = dense[0] <= least and low - least < spacing
    from_top = most <= dense[1] and most - high < spacing
    if pair.has_atoms:
        origin = least if from_bottom else 0.0
    elif from_bottom:
        origin = _balanced_end(pair, spacing, least, +1)
    elif from_top:
        origin = _balanced_end(pair, spacing, most, -1)
    else:
        origin = 0.0
    first, last = math.floor((low - origin) / spacing), math.ceil((high - origin) / spacing)
    if from_bottom:
        first = 0
    if from_top and not pair.has_atoms:
        last = 0
    last = max(last, first + 1)
    points = _selection(first, last, origin, spacing, dense)
    # Cell k holds the losses between the midpoints around points[k]; beyond the dense part cells are wide.
    edges = origin + spacing * (points[:-1].astype(np.float64) + 0.5)
    if not pair.has_atoms:
        p, q = pair.cells(np.concatenate([[-np.inf], edges, [np.inf]]))
        return _merge(p, q, points, edges, origin, spacing, bottom_is_known=from_bottom)
    # The top atom is a cell of its own: merged with what lies below it, it would go down a whole point.
    inside, beyond = math.nextafter(most, -math.inf), math.nextafter(most, math.inf)
    edges = edges[edges < inside]
    p, q = pair.cells(np.concatenate([[-np.inf], edges, [inside, beyond]]))
    law = _merge(p[:-1], q[:-1], points[: len(edges) + 1], edges, origin, spacing, bottom_is_known=from_bottom)
    top = math.floor((most - origin) / spacing * (1 + _ROUNDING))
    index, mass = np.append(law.index, top), np.append(law.mass, p[-1])
    return LatticeLaw.of(index, mass, law.origin, law.spacing, pair.infinite)


def _merge(
    p: Array, q: Array, points: Indices, edges: Array, origin: float, spacing: float, *, bottom_is_known: bool
) -> LatticeLaw:
    """Merge neighbours until every cell's likelihood ratio is a lattice point's, or round it down."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        ratio = np.exp(origin + spacing * points)
        blind = (p < _LEAST_MASS) | (q < _LEAST_MASS) | ~np.isfinite(ratio)
        excess = p - ratio * q
        downward = excess > -_ROUNDING * p  # the cell's loss is not below its point: outcomes from below are wanted
        from_below = np.concatenate([[0.0], ratio[1:] * q[:-1] - p[:-1]])
        from_above = np.concatenate([p[1:] - ratio[:-1] * q[1:], [0.0]])
        wanted = np.where(downward, np.maximum(excess, 0.0), -excess) / np.where(downward, from_below, from_above)
        mean = np.log(p) - np.log(q)
    blind_lender = np.where(downward, np.append(True, blind[:-1]), np.append(blind[1:], True))
    contiguous = np.diff(points) == 1
    dense = np.append(contiguous, True) & np.append(True, contiguous)
    borrows = dense & ~blind & ~blind_lender & (wanted >= 0) & (wanted <= _MOST_LENT)
    wanted = np.where(borrows, wanted, 0.0)
    kept_most = np.ones_like(p)
    for _ in range(3):
        # Bounds on what is kept and what is borrowed, each from the other; they close in geometrically.
        kept_least = 1 - _lent(wanted * kept_most, downward)
        kept_most = 1 - _lent(wanted * kept_least, downward)
    # From below, borrow no more than balances; from above, no less: the true ratio is never below the point's.
    borrowed = wanted * np.where(downward, kept_least, kept_most)
    mass = p * (1 - _lent(borrowed, downward))
    mass[1:] += np.where(downward[1:], borrowed[1:] * p[:-1], 0.0)
    mass[:-1] += np.where(~downward[:-1], borrowed[:-1] * p[1:], 0.0)
    # Without a lender, round down: to the cell's point if its loss is above that, else below its mean or its edge.
    lowest = np.append(float(points[0] - 1) if bottom_is_known else -math.inf, np.floor((edges - origin) / spacing))
    rounded = np.where(np.isfinite(mean) & ~blind, np.floor((mean - origin) / spacing - _ROUNDING), -math.inf)
    index = np.where(borrows | (dense & downward & ~blind), points, np.maximum(rounded, lowest))
    known = np.isfinite(index)
    return LatticeLaw.of(index[known].astype(np.int64), mass[known], origin, spacing, 0.0)


def _lent(borrowed: Array, downward: NDArray[np.bool_]) -> Array:
    """What each cell lends: to the one above if that borrows from below, to the one below if that does from above."""
    lent = np.zeros_like(borrowed)
    lent[:-1] += np.where(downward[1:], borrowed[1:], 0.0)
    lent[1:] += np.where(~downward[:-1], borrowed[:-1], 0.0)
    return lent


def _balanced_end(pair: LossPair, spacing: float, end: float, inward: int) -> float:
    """The origin for which the outermost cell, from `end` to half a spacing inside the origin, balances exactly."""

    def mean_offset(edge: float) -> float:
        """How far the outer cell's loss is from edge - inward * spacing / 2, measured inwards."""
        levels = [-np.inf, edge] if inward > 0 else [edge, np.inf]
        p, q = pair.cells(np.array(levels))
        if not (p[0] > 0 and q[0] > 0):
            return spacing / 2
        return float(inward * (math.log(p[0]) - math.log(q[0]) - edge) + spacing / 2)

    near, far = 0.0, spacing
    while mean_offset(end + inward * far) > 0 and far < 64 * spacing:
        near, far = far, 2 * far
    if mean_offset(end + inward * far) > 0:
        return end
    edge = float(optimize.brentq(lambda d: mean_offset(end + inward * d), near, far, xtol=1e-17, rtol=1e-14))
    return end + inward * (edge - spacing / 2)


def _selection(first: int, last: int, origin: float, spacing: float, dense: tuple[float, float]) -> Indices:
    """Indices from first to last: all whose losses are in the dense range, geometrically fewer beyond."""
    low = min(max(first, math.floor((dense[0] - origin) / spacing)), last - 1)
    high = max(min(last, math.ceil((dense[1] - origin) / spacing)), low + 1)
    inside = np.arange(low, high + 1, dtype=np.int64)
    return np.concatenate([low - _growing(low - first)[::-1], inside, high + _growing(last - high)])


def _growing(distance: int) -> Indices:
    """1 .. distance, with gaps that grow in proportion; ends at distance."""
    if distance <= 0:
        return np.empty(0, dtype=np.int64)
    count = math.ceil(math.log(distance + 1) / math.log(_TAIL_RATIO)) + 1
    return np.unique(np.round(np.exp(np.linspace(0, math.log(distance), count))).astype(np.int64))


def _snapped(t: Array, least: float, most: float) -> Array:
    """Points that should be the ends of the support but for rounding are made so."""
    t = np.where(np.abs(t - least) <= 4e-16 * (1 + np.abs(t)), least, t) if math.isfinite(least) else t
    return np.where(np.abs(t - most) <= 4e-16 * (1 + np.abs(t)), most, t) if math.isfinite(most) else t
