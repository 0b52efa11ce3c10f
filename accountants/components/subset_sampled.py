"""Noise on a batch of fixed size: three laws, pairwise within two clip norms, of which neighbours mix two each.

Given who else is in the batch, the answer has law A without the example, B with it, B' with its replacement, and the
neighbours are (1 - q) A + q B and (1 - q) A + q B'. Let h(c) be the hockey-stick divergence H_c of the noise moved by
two clip norms, which bounds that of any two of A, B, B'. Advanced joint convexity [1] says, for c >= 1,

    H_c((1 - q) A + q B || (1 - q) A + q B')  =  q H_c'(B || (1 - b) A + b B')  <=  q h(c'),    c' = 1 + (c - 1) / q,

with some b in [0, 1], and q h(c') is H_c of the mixture M = (1 - q) A(0) + q A(1) against A(0), the law A(1) being two
clip norms from A(0). For c < 1, H_c(P || Q) = c H_(1/c)(Q || P) + 1 - c carries the bound over. The bound is the curve
of one pair [2]: its masses are

    losses > 0    those of (M, A(0)) there
    losses < 0    those of (A(0), M) there
    loss 0        what is left of either law, the same for both

so neighbours may change places: both directions have this one pair.

References:
    [1] Balle, Barthe, Gaboardi, Privacy Amplification by Subsampling: Tight Analyses via Couplings and Divergences,
        2018. arXiv:1807.01647
    [2] Zhu, Dong, Wang, Optimal Accounting of Differential Privacy via Characteristic Function, 2022.
        arXiv:2106.08567
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from scipy import special

from accountants.components.component import Array, Component, Direction, LossPair
from accountants.components.sampled_noise import SampledNoise

SLACK = 1e-10  # relative: added to every moment, above the quadrature's error (tests/accountants/test_sampling_events)
_TAIL = 12.0  # standard deviations beyond the last centre: what is cut weighs exp(-72)
_NODES = 2**16  # the most nodes of one quadrature; beyond, a convexity bound stands in
_LEAST_LAPLACE = 1e-3  # below this scale, one step's pure epsilon of 1000 or more is bound enough
_PANEL_X, _PANEL_W = np.polynomial.legendre.leggauss(16)


@dataclasses.dataclass(frozen=True)
class SubsetSampled(Component):
    """A batch of fixed size, one example of the data set replaced.

    Attributes:
        sampled: (M, A(0)): the noise over two clip norms, at the rate batch size / data set size.
        attained: what some neighbours attain; None if no such are known.
    """

    sampled: SampledNoise
    attained: SampledNoise | None

    def pair(self, direction: Direction) -> SubsetSampledPair:
        """The same in both directions."""
        return SubsetSampledPair(self.sampled)

    def witness(self, direction: Direction) -> LossPair | None:
        """The pair of `attained`."""
        return None if self.attained is None else self.attained.pair(direction)

    def log_moments(self, direction: Direction, t: Array) -> Array:
        """By quadrature, relative error about 1e-10, rounded up."""
        return _log_moments(self.sampled, np.asarray(t, dtype=np.float64))


@dataclasses.dataclass(frozen=True)
class SubsetSampledPair(LossPair):
    """The upper half of (M, A(0)), the lower half of (A(0), M), and an atom at 0."""

    sampled: SampledNoise

    @property
    def support(self) -> tuple[float, float]:
        """Symmetric."""
        most = self.sampled.pair("remove").support[1]
        return -most, most

    @property
    def has_atoms(self) -> bool:
        """As the noise has; the atom at 0 is on every lattice anyway."""
        return self.sampled.pair("remove").has_atoms

    def tails(self, mass: float) -> tuple[float, float]:
        """Those of the two halves."""
        if self.has_atoms:
            return self.support
        low = self.sampled.pair("add").tails(mass)[0]
        high = self.sampled.pair("remove").tails(mass)[1]
        return min(low, 0.0), max(high, 0.0)

    def cells(self, levels: Array) -> tuple[Array, Array]:
        """The atom at 0 belongs to the cell below it if there is one."""
        p_above, q_above = self.sampled.pair("remove").cells(np.maximum(levels, 0.0))
        p_below, q_below = self.sampled.pair("add").cells(np.minimum(levels, 0.0))
        atom = _unmoved(self.sampled) * ((levels[:-1] < 0) & (levels[1:] >= 0))
        return p_above + p_below + atom, q_above + q_below + atom


def _unmoved(sampled: SampledNoise) -> float:
    """Mass at loss 0: 1 - M(x > 1/2) - A(0)(x > 1/2) = (1 - q) times the total variation of A(0) and A(1)."""
    half = 0.5 / sampled.scale
    distance = float(special.erf(half / math.sqrt(2))) if sampled.noise == "gaussian" else -math.expm1(-half)
    return (1 - sampled.rate) * distance


def _log_moments(sampled: SampledNoise, t: Array) -> Array:
    """log E_P exp(t L), with l = M / A(0) = e^L and x beyond the midpoint of the two centres:

        E_P e^(tL) - 1 = E_A(0) [l^(1 + t) + l^(-t) - 1 - l; x > 1/2]
                       = E_A(0) [l^(1 + t) (1 - l^(-t)) (1 - l^(-(1 + t))); x > 1/2],

    which has no cancellation.
    """
    nodes = _nodes(sampled, 2.0 ** math.ceil(math.log2(max(float(t.max()), 1.0))))
    if nodes is None:
        if sampled.noise == "laplace":
            return t * (1 / sampled.scale) * (1 + SLACK)
        # The upper half is at most E_A(0) l^(1 + t) <= 1 - q + q E (A(1) / A(0))^(1 + t); the rest is at most 1.
        whole = t * (t + 1) / 2 / sampled.scale / sampled.scale
        return np.logaddexp(math.log(2), math.log(sampled.rate) + whole) * (1 + SLACK)
    log_weight, loss = nodes
    with np.errstate(divide="ignore"):
        terms = np.log(-np.expm1(-np.multiply.outer(t, loss))) + np.log(-np.expm1(-np.multiply.outer(1 + t, loss)))
    terms += np.multiply.outer(1 + t, loss) + log_weight
    moments: Array = np.logaddexp(0.0, special.logsumexp(terms, axis=1)) * (1 + SLACK)
    return moments


@functools.lru_cache(maxsize=64)
def _nodes(sampled: SampledNoise, largest: float) -> tuple[Array, Array] | None:
    """Quadrature over x > 1/2 for moments up to `largest`: log weight under A(0), and L >= 0; None if too many."""
    scale, rate = sampled.scale, sampled.rate
    if sampled.noise == "gaussian":
        end = 1 + largest + _TAIL * scale
        # log l is singular at distance pi scale^2 from the real line.
        panels = (end - 0.5) / (1.5 * min(scale, scale * scale))
        if panels * len(_PANEL_X) > _NODES:
            return None
        x, weight = _panels(np.linspace(0.5, end, math.ceil(panels) + 1))
        log_weight = np.log(weight) - x * x / (2 * scale * scale) - math.log(scale * math.sqrt(2 * math.pi))
        unsampled = (2 * x - 1) / (2 * scale * scale)
    else:
        if scale < _LEAST_LAPLACE:
            return None
        # Up to the farther centre; beyond, the ratio is constant: one atom. High moments live within scale / t of
        # that centre, hence panels that halve towards it.
        finer = 0.5 ** np.arange(1, max(0, math.ceil(math.log2(largest / scale))) + 4)
        x, weight = _panels(np.unique(np.concatenate([np.linspace(0.5, 1, math.ceil(1 / scale) + 1), 1 - finer])))
        log_weight = np.append(np.log(weight / (2 * scale)) - x / scale, math.log(0.5) - 1 / scale)
        unsampled = np.append((2 * x - 1) / scale, 1 / scale)
    excess = rate * np.expm1(np.minimum(unsampled, 1.0))
    log_mixture = np.logaddexp(math.log1p(-rate), math.log(rate) + unsampled)
    return log_weight, np.where(unsampled < 1, np.log1p(excess), log_mixture)


def _panels(edges: Array) -> tuple[Array, Array]:
    """Gauss-Legendre points and weights on each panel."""
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (1 + _PANEL_X)).ravel(), (half * _PANEL_W).ravel()
