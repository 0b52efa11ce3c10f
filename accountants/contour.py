"""The hockey-stick divergence of many Poisson-sampled Gaussian steps, by inverting its transform along a line.

With K the log moments of all steps together and z = t + i w,

    delta(eps) = 1 / (2 pi) int e^(K(z) - z eps) / (z (z + 1)) dw                                  [1, Theorem 4.1],

and the trapezoid rule with nodes 2 pi / W apart is the periodic sum of period W (`periodic`), exactly (Poisson
summation). Nothing is put on a lattice: what is left out is the sum beyond the last node, bounded through the decay of
each step's transform (`quadrature.LossNodes.decay`), losses cut off in the far tails, which count as infinite from
above and as nothing from below, and rounding, by a model of it with a margin.

The transform of one step at all frequencies is a non-uniform Fourier sum over its quadrature nodes, computed as a
short Taylor series around the points of a grid, one transform a term:

    sum_j c_j e^(i w l_j) = sum_r (i w)^r / r! sum_j c_j d_j^r e^(i w g_j),      l_j = g_j + d_j, g_j on the grid.

References:
    [1] Alghamdi et al., The Saddle-Point Method in Differential Privacy, 2023. arXiv:2208.09595
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from accountants import quadrature
from accountants.components.component import Array
from accountants.periodic import PeriodicSum
from accountants.quadrature import LossNodes

Complex = NDArray[np.complex128]

MOST_FREQUENCIES = 2**17
_UNIT = 2.0**-53
_NEGLIGIBLE = -46.0  # log of a frequency's weight that is bounded, not summed
_TERMS = 22  # of the Taylor series: (pi / 2)^22 / 22! < 1e-16
_OVERSAMPLING = 2
_TRIALS = np.geomspace(1e-2, 1e12, 141)  # last frequencies to try


@dataclasses.dataclass(frozen=True)
class Line:
    """Where the transform is inverted.

    Attributes:
        tilt: t > 0.
        extra: s > 0, for the bound on the periodic sum's other terms.
        width: W, in units of loss; frequencies are 2 pi / W apart.
        count: frequencies 0 .. count - 1 are used.
    """

    tilt: float
    extra: float
    width: float
    count: int

    @property
    def frequencies(self) -> Array:
        """Shape [count], radians per unit of loss."""
        return 2 * math.pi / self.width * np.arange(self.count, dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class StepTransform:
    """M(t + i w) of one step on a line.

    Attributes:
        log_mass: log M(t).
        log_mass_extra: log M(t + s), from above.
        mean: of the tilted loss.
        log_transform: log M(t + i w) / M(t) without the mean's phase, shape [count], complex.
        rounding: bound on the error of M(t + i w) / M(t), same shape.
        log_beyond: log of a bound on |M(t + i w)| / M(t) at all frequencies beyond the last.
        cut: P-mass that is not in it.
    """

    log_mass: float
    log_mass_extra: float
    mean: float
    log_transform: Complex
    rounding: Array
    log_beyond: float
    cut: float

    @staticmethod
    def of(nodes: LossNodes, line: Line) -> StepTransform:
        """Transform the nodes' tilted weights."""
        weights, log_mass = nodes.tilted(line.tilt)
        log_mass_extra = float(nodes.log_moments(np.array([line.tilt + line.extra]))[0])
        mean = float(np.dot(weights, nodes.loss))
        spread = float(np.dot(weights, np.abs(nodes.loss)))
        transform = _fourier(weights, nodes.loss - mean, line)
        with np.errstate(divide="ignore"):
            log_transform = np.log(transform)
        log_transform.real = np.maximum(log_transform.real, -700.0)
        log_transform.imag = np.unwrap(log_transform.imag)  # counts may be fractions
        frequencies = line.frequencies
        # Each weight is good to some units of the exponents that it was made from.
        exponents = 1 + float(np.dot(weights, np.abs(nodes.log_weight))) + line.tilt * spread + abs(log_mass)
        rounding = _UNIT * (8 * math.log2(line.count + 2) + 16 * exponents + 8 * frequencies * spread)
        mass, variation = nodes.decay(line.tilt)
        beyond = float(np.min(1 - mass + variation / frequencies[-1]))
        return StepTransform(
            log_mass,
            log_mass_extra + 1e-8,
            mean,
            log_transform,
            rounding + quadrature.ACCURACY,
            math.log(beyond) if beyond < 1 else 0.0,
            nodes.cut,
        )


def last_frequency(parts: Sequence[tuple[LossNodes, float]], tilt: float, log_share: float) -> float:
    """A frequency beyond which the transform's modulus adds up to less than e^log_share, as cheaply as it is proved.

    Args:
        parts: nodes of each component with their least count.
        tilt: t.
        log_share: log of what may be lost, of S e^(t eps) / M(t)^T.
    """
    log_left = -np.log(math.pi * _TRIALS)
    for nodes, count in parts:
        mass, variation = nodes.decay(tilt)
        beyond = np.min(1 - mass[:, None] + variation[:, None] / _TRIALS, axis=0)
        log_left += count * np.log(np.minimum(beyond, 1.0))
    enough = np.flatnonzero(log_left <= log_share)
    return float(_TRIALS[enough[0]]) if len(enough) else math.inf


def _fourier(weights: Array, loss: Array, line: Line) -> Complex:
    """sum_j c_j e^(i w l_j) at the line's frequencies."""
    size = 1 << math.ceil(math.log2(max(_OVERSAMPLING * line.count, 512)))
    position = loss * (size / line.width)
    nearest = np.round(position)
    offset = position - nearest
    index = nearest.astype(np.int64) % size
    # Powers of i w d = i (2 pi k / size) (position - nearest), |that| <= pi / 2.
    turns: Complex = 2j * math.pi / size * np.arange(line.count)
    total: Complex = np.zeros(line.count, dtype=np.complex128)
    factor: Complex = np.ones(line.count, dtype=np.complex128)
    moment = weights
    for term in range(_TERMS):
        spectrum = fft.rfft(np.bincount(index, weights=moment, minlength=size))[: line.count]
        total += factor * spectrum.conj()
        factor *= turns / (term + 1)
        moment = moment * offset
    return total


class ContourSum(PeriodicSum):
    """The periodic sum of a composition.

    Args:
        transforms: of each component, all on `line`.
        counts: steps of each, > 0.
        line: shared.
        uncertainty: further error of log M(t + i w) of the composition, shape [line.count].
        upper: whether to bound from above or from below.
    """

    def __init__(
        self,
        transforms: Sequence[StepTransform],
        counts: Sequence[float],
        line: Line,
        uncertainty: Array,
        *,
        upper: bool,
    ) -> None:
        total = np.zeros(line.count, dtype=np.complex128)
        log_mass = log_mass_extra = mean = log_kept = log_beyond = 0.0
        for transform, count in zip(transforms, counts, strict=True):
            total += count * transform.log_transform
            log_mass += count * transform.log_mass
            log_mass_extra += count * transform.log_mass_extra
            mean += count * transform.mean
            log_kept += count * math.log1p(-transform.cut)
            log_beyond += count * transform.log_beyond
        sensitivity = np.zeros(line.count)
        for transform, count in zip(transforms, counts, strict=True):
            sensitivity += count * transform.rounding * np.exp(total.real - transform.log_transform.real)
        sensitivity += np.expm1(np.minimum(uncertainty, 700.0)) * np.exp(total.real)
        frequencies = line.frequencies
        z = line.tilt + 1j * frequencies
        coefficient = np.full(line.count, 2 / line.width, dtype=np.complex128) / (z * (z + 1))
        coefficient[0] /= 2
        size = np.abs(coefficient)
        kept = total.real > _NEGLIGIBLE
        dropped = math.exp(_NEGLIGIBLE) * float(size[~kept].sum())
        # sum over k >= count of (2 / W) e^log_beyond / w_k^2 <= e^log_beyond / (pi w_last).
        beyond = math.exp(log_beyond) / (math.pi * frequencies[-1])
        self._mean, self._frequencies = mean, frequencies[kept]
        self._terms = coefficient[kept] * np.exp(total[kept])
        # Of the final sum, its phases and its factors.
        arithmetic = _UNIT * float(np.dot(np.abs(self._terms), 64 + 4 * line.width * self._frequencies))
        super().__init__(
            tilt=line.tilt,
            extra=line.extra,
            width=line.width,
            log_mass=log_mass,
            log_mass_extra=log_mass_extra,
            infinite=-math.expm1(log_kept),
            error=float(np.dot(size, sensitivity)) + dropped + beyond + arithmetic,
            rounding=abs(mean) * 1e-3,
            upper=upper,
        )

    def _normalised(self, epsilon: float) -> float:
        """The trapezoid rule; the integrand's values come in conjugate pairs."""
        return float(np.dot(self._terms, np.exp(-1j * (epsilon - self._mean) * self._frequencies)).real)
