"""The likelihood ratio of a Gaussian hidden in one of T bins, enclosed between two laws with finitely many atoms.

With l_i = exp(x_i / s^2 - 1 / (2 s^2)) and x_i ~ N(0, s^2) independent, the ratio of "one of the T coordinates, at
random, is moved by 1" to "none is" is R = (l_1 + ... + l_T) / T under the second law, Q, and

    H_c(P || Q) = E_Q max(R - c, 0)

is the expectation of a convex function of R. So a law of R that is larger in the convex order (mass spread, mean
kept) dominates and one that is smaller (mass merged at its mean) is dominated. Sums of independent variables keep the
order: spreading or merging each l_i, and each partial average, on a grid of finitely many points leads to bounds on
the whole, T averages in about log2(T) stages. Privacy loss distributions of random allocation by numerical
convolution are the subject of [1]; the enclosure here is self-contained.

Spread masses may move to ratio 0 and to infinity: the tails that are cut are kept there.

References:
    [1] Feldman, Shenfeld, Efficient Privacy Loss Accounting for Subsampling and Random Allocation, 2026.
        arXiv:2602.17284
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from numpy.typing import NDArray
from scipy import special

from accountants.components.atoms import Atoms
from accountants.components.component import Array, Direction

Indices = NDArray[np.int64]

_POINTS = 1024  # kept after each stage
_FINE = 2**14  # on which a stage's averages are collected
_TAIL = 1e-24  # mass cut off each end at each stage, moved outwards where the law is to dominate
_DEVIATIONS = 10.5  # standard deviations of one l_i's logarithm: beyond is about _TAIL
_ROOT = 0.12  # power of the mass that the kept points' density follows
_EVEN_SHARE = 0.2  # of the kept points spread evenly over log R, whatever the mass there


@dataclasses.dataclass(frozen=True, eq=False)
class RatioLaw:
    """A law of R under Q.

    Attributes:
        ratio: increasing and finite, >= 0, shape [N].
        q: Q's mass at each, shape [N]; P's is ratio * q.
        infinite: P's mass where Q has none.
    """

    ratio: Array
    q: Array
    infinite: float

    def atoms(self, direction: Direction) -> Atoms:
        """As point masses sorted by loss; those of the second law at loss -inf are left out."""
        positive = self.ratio > 0
        q, p, losses = self.q[positive], (self.ratio * self.q)[positive], np.log(self.ratio[positive])
        if direction == "remove":
            return Atoms(losses, p, q, self.infinite)
        return Atoms(-losses[::-1], q[::-1], p[::-1], float(self.q[~positive].sum()))


@functools.lru_cache(maxsize=8)
def ratio_law(scale: float, bins: int, *, dominating: bool) -> RatioLaw:
    """The law of R, from above or from below in the convex order.

    Args:
        scale: s, the noise's standard deviation, not below 0.05 (masses of Q underflow).
        bins: T >= 1.
        dominating: from above.
    """
    power, size = _one(scale, dominating=dominating), 1
    total: RatioLaw | None = None
    done = 0
    while True:
        if bins & size:
            total = power if total is None else _average(total, done, power, size, dominating=dominating)
            done += size
        if done == bins:
            assert total is not None
            return total
        power = _average(power, size, power, size, dominating=dominating)
        size *= 2


def _one(scale: float, *, dominating: bool) -> RatioLaw:
    """The law of one l_i, from the Gaussian's masses between points."""
    centre = 0.5 / (scale * scale)
    reach = _DEVIATIONS / scale
    loss = np.linspace(-centre - reach, centre + reach, _FINE)
    edges = np.concatenate([[-np.inf], loss, [np.inf]])
    q = _normal_masses(scale * (edges + centre))
    p = _normal_masses(scale * (edges - centre))
    nodes = np.concatenate([[0.0], np.exp(loss)])
    if not dominating:
        return _merged(p, q)
    law = _spread(np.arange(len(nodes)), nodes, p, q)
    return _thinned(law)


def _normal_masses(z: Array) -> Array:
    """Standard normal mass between consecutive z, without cancellation in either tail."""
    tail = special.ndtr(-np.abs(z))
    left, right = tail[:-1], tail[1:]
    both_sides = (z[:-1] < 0) & (z[1:] > 0)
    masses: Array = np.where(both_sides, 1 - left - right, np.abs(right - left))
    return masses


def _average(a: RatioLaw, a_size: int, b: RatioLaw, b_size: int, *, dominating: bool) -> RatioLaw:
    """The law of the average of a_size + b_size ratios, from those of a_size and of b_size."""
    share = a_size / (a_size + b_size)
    ratio = np.add.outer(share * a.ratio, (1 - share) * b.ratio).ravel()
    q = np.multiply.outer(a.q, b.q).ravel()
    p = ratio * q
    # Averages with a ratio of 0 in them fall below `low`, into the cell that starts at 0.
    low = math.log(share * _least(a.ratio) + (1 - share) * _least(b.ratio))
    high = math.log(share * a.ratio[-1] + (1 - share) * b.ratio[-1])
    nodes = np.concatenate([[0.0], np.exp(np.linspace(low, high, _FINE))])
    with np.errstate(divide="ignore"):
        place = (np.log(ratio) - low) * ((_FINE - 1) / max(high - low, 1e-300))
    cell = np.clip(np.floor(place) + 1, 0, _FINE - 1).astype(np.int64)
    if not dominating:
        return _merged(_collected(cell, p, _FINE), _collected(cell, q, _FINE))
    infinite = share * a.infinite + (1 - share) * b.infinite
    return _thinned(_spread(cell, nodes, p, q, infinite))


def _least(ratio: Array) -> float:
    """The least that is not 0."""
    return float(ratio[1] if ratio[0] == 0 else ratio[0])


def _collected(cell: Indices, mass: Array, cells: int) -> Array:
    """The mass in each cell, shape [cells]."""
    total: Array = np.bincount(cell, mass, minlength=cells).astype(np.float64, copy=False)
    return total


def _spread(cell: Indices, nodes: Array, p: Array, q: Array, infinite: float = 0.0) -> RatioLaw:
    """Mass (p, q) in the cell from nodes[cell] up goes to both its ends, so that p and q are both kept.

    In the last cell, from the last node to infinity, q stays at the node and what p has more goes to infinity.
    """
    last = len(nodes) - 1
    inside = cell < last
    infinite += float(np.sum((p - q * nodes[last])[~inside]))
    width = nodes[np.minimum(cell + 1, last)] - nodes[cell]
    up = np.clip((p - q * nodes[cell]) / np.where(inside, width, 1.0), 0.0, q)
    up = np.where(inside, up, 0.0)
    mass = _collected(cell, q - up, last + 1) + _collected(np.minimum(cell + 1, last), up, last + 1)
    return _normalised(nodes, mass, max(infinite, 0.0))


def _normalised(ratio: Array, q: Array, infinite: float) -> RatioLaw:
    """Both laws' totals put back to 1, from which T products of rounded masses would drift away."""
    q = q / q.sum()
    return RatioLaw(ratio * ((1 - infinite) / (ratio @ q)), q, infinite)


def _thinned(law: RatioLaw) -> RatioLaw:
    """The law spread to fewer points."""
    p = law.ratio * law.q
    kept = _chosen(p, law.q)
    nodes = np.concatenate([[0.0], law.ratio[kept[kept > 0]]])
    cell = np.searchsorted(nodes, law.ratio, side="right") - 1
    return _spread(cell, nodes, p, law.q, law.infinite)


def _merged(p: Array, q: Array) -> RatioLaw:
    """Neighbouring masses merged at their means, into fewer points."""
    mass = (p > 0) & (q > 0)
    p, q = p[mass], q[mass]
    start = _chosen(p, q)
    start[0] = 0
    p, q = np.add.reduceat(p, start), np.add.reduceat(q, start)
    return _normalised(p / q, q, 0.0)


def _chosen(p: Array, q: Array) -> Indices:
    """Indices to keep: dense where mass is, none in the tails.

    Moving mass m by h costs about m h^2, so at delta near 1 points are best as dense as the cube root of the mass; a
    higher root serves the tails, which compositions and small delta look at.
    """
    below, above = np.cumsum(np.maximum(p, q)), np.cumsum(np.maximum(p, q)[::-1])[::-1]
    inside = np.flatnonzero((below > _TAIL) & (above > _TAIL))
    density = (0.5 * (p + q)[inside]) ** _ROOT
    density = (1 - _EVEN_SHARE) * density / density.sum() + _EVEN_SHARE / len(inside)
    position = np.cumsum(density)
    wanted = np.searchsorted(position, np.linspace(position[0], position[-1], _POINTS))
    return inside[np.unique(np.clip(wanted, 0, len(inside) - 1))]
