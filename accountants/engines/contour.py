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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from accountants.components.component import Array
from accountants.engines import quadrature
from accountants.engines.periodic import PeriodicSum
from accountants.engines.quadrature import PI, LossNodes, Reals

Complex = NDArray[np.complexfloating[Any, Any]]

MOST_FREQUENCIES = 2**18
_UNIT = 2.0**-53
_NEGLIGIBLE = -46.0  # log of a frequency's weight that is bounded, not summed
_NEAR_TERMS = 22
_LEAST_MODULUS = 1e-300
_TERMS = {np.dtype(np.float64): 22, np.dtype(np.longdouble): 26}  # (pi / 2)^22 / 22! < 2e-17, ^26 / 26! < 4e-22
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
    def last(self) -> float:
        """The last frequency, radians per unit of loss."""
        return 2 * math.pi / self.width * (self.count - 1)

    def frequencies(self, kind: np.dtype[np.floating[Any]]) -> Reals:
        """Shape [count], radians per unit of loss, to the precision of the type."""
        frequencies: Reals = 2 * kind.type(PI) / self.width * np.arange(self.count, dtype=kind)
        return frequencies


@dataclasses.dataclass(frozen=True)
class StepTransform:
    """M(t + i w) of one step on a line.

    Attributes:
        log_mass: log M(t).
        log_mass_extra: log M(t + s), from above.
        mean: of the tilted loss.
        log_transform: log M(t + i w) / M(t) without the mean's phase, shape [count], complex.
        rounding: bound on the error of log_transform at each frequency, beyond what all share; same shape.
        scale_rounding: bound on the error of log M that all frequencies share.
        log_beyond: log of a bound on |M(t + i w)| / M(t) at all frequencies beyond the last.
        cut: P-mass that is not in it.
    """

    log_mass: float
    log_mass_extra: float
    mean: np.floating[Any]
    log_transform: Complex
    rounding: Array
    scale_rounding: float
    log_beyond: float
    cut: float

    @staticmethod
    def of(nodes: LossNodes, line: Line) -> StepTransform:
        """Transform the nodes' tilted weights.

        What is computed is G = M(t + i w) / M(t) - 1, the sum of weight * (e^(i w l) - 1): where steps are many, it
        is small, and so is its rounding. Losses so near the mean that no frequency turns them by a radian enter by
        their moments, the others by a Fourier sum.
        """
        weights, log_mass = nodes.tilted(line.tilt)
        mean = np.dot(weights, nodes.loss)
        loss = nodes.loss - mean
        frequencies = line.frequencies(weights.dtype)
        near = np.abs(loss) * frequencies[-1] <= 1.0
        gained = _by_moments(weights[near], loss[near], frequencies)
        far_mass = weights[~near].sum()
        if far_mass > 0:
            gained += _fourier(weights[~near], loss[~near], line) - far_mass
        log_transform = np.empty_like(gained)
        squared = 2 * gained.real + np.abs(gained) ** 2
        modulus = np.maximum(np.abs(1 + gained), _LEAST_MODULUS)
        log_transform.real = np.where(squared > -0.5, 0.5 * np.log1p(np.maximum(squared, -0.5)), np.log(modulus))
        log_transform.imag = np.unwrap(np.arctan2(gained.imag, 1 + gained.real))  # counts may be fractions

        # Each weight is good to some units of the exponent that it was made from, each loss likewise.
        size, moved = np.abs(nodes.loss), np.abs(loss)
        units = weights * (nodes.weight_units + line.tilt * nodes.loss_units * size)
        turned = 2 * units[~near].sum() + frequencies * np.dot(units[near], moved[near])
        phases = frequencies * np.dot(weights, nodes.loss_units * size + 4 * (moved + abs(mean)))
        sums = 8 * math.log2(line.count + 2) * far_mass + 32 * np.abs(gained)
        unit = _unit(weights)
        absolute = unit * (turned + phases + sums) + quadrature.ACCURACY
        mass, variation = nodes.decay(line.tilt)
        beyond = float(np.min(1 - mass + variation / float(frequencies[-1])))
        log_mass_extra = float(nodes.log_moments(np.array([line.tilt + line.extra]))[0])
        return StepTransform(
            log_mass,
            log_mass_extra + 1e-8,
            mean,
            log_transform,
            (absolute * np.exp(-log_transform.real)).astype(np.float64),
            unit * float(units.sum()) + _UNIT * abs(log_mass),
            math.log(beyond) if beyond < 1 else 0.0,
            nodes.cut,
        )


def _unit(numbers: Reals) -> float:
    """Unit of rounding of their type."""
    return float(np.finfo(numbers.dtype).eps) / 2


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


def _by_moments(weights: Reals, loss: Reals, frequencies: Reals) -> Complex:
    """sum_j c_j (e^(i w l_j) - 1) where |w l_j| <= 1, by the exponential series: what it leaves is below 1e-21."""
    scale = frequencies[-1]
    turns = 1j * (frequencies / scale)
    total: Complex = np.zeros_like(turns)
    for term in range(_NEAR_TERMS, 0, -1):
        moment = np.dot(weights, (scale * loss) ** term) / math.factorial(term)
        total = (total + moment) * turns
    return total


def _fourier(weights: Reals, loss: Reals, line: Line) -> Complex:
    """sum_j c_j e^(i w l_j) at the line's frequencies."""
    size = 1 << math.ceil(math.log2(max(_OVERSAMPLING * line.count, 512)))
    position = loss * (size / line.width)
    nearest = np.round(position)
    offset = position - nearest
    index = nearest.astype(np.int64) % size
    # Powers of i w d = i (2 pi k / size) (position - nearest), |that| <= pi / 2.
    turns = 2j * weights.dtype.type(PI) / size * np.arange(line.count, dtype=weights.dtype)
    total, factor = np.zeros_like(turns), np.ones_like(turns)
    moment = weights
    for term in range(_TERMS[weights.dtype]):
        grid = np.zeros(size, dtype=weights.dtype)
        np.add.at(grid, index, moment)
        spectrum = fft.rfft(grid)[: line.count]
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
        total = np.zeros_like(transforms[0].log_transform)
        mean = total.real.dtype.type(0)
        log_mass = log_mass_extra = log_kept = log_beyond = scale_rounding = 0.0
        for transform, count in zip(transforms, counts, strict=True):
            total += count * transform.log_transform
            log_mass += count * transform.log_mass
            log_mass_extra += count * transform.log_mass_extra
            mean += count * transform.mean
            log_kept += count * math.log1p(-transform.cut)
            log_beyond += count * transform.log_beyond
            scale_rounding += count * transform.scale_rounding
        wrong = uncertainty.copy()
        for transform, count in zip(transforms, counts, strict=True):
            wrong += count * transform.rounding
        modulus = np.exp(total.real).astype(np.float64)
        sensitivity = np.expm1(np.minimum(wrong, 600.0)) * modulus
        frequencies = line.frequencies(total.real.dtype)
        z = line.tilt + 1j * frequencies
        coefficient = 2 / line.width / (z * (z + 1))
        coefficient[0] /= 2
        size = np.abs(coefficient).astype(np.float64)
        kept = total.real > _NEGLIGIBLE
        dropped = math.exp(_NEGLIGIBLE) * float(size[~kept].sum())
        # sum over k >= count of (2 / W) e^log_beyond / w_k^2 <= e^log_beyond / (pi w_last).
        beyond = math.exp(log_beyond) / (math.pi * line.last)
        self._mean, self._frequencies = mean, frequencies[kept]
        self._terms = coefficient[kept] * np.exp(total[kept])
        # Of the final sum, its phases and its factors.
        arithmetic = _unit(frequencies) * float(np.dot(np.abs(self._terms), 64 + 4 * line.width * self._frequencies))
        super().__init__(
            tilt=line.tilt,
            extra=line.extra,
            width=line.width,
            log_mass=log_mass,
            log_mass_extra=log_mass_extra,
            infinite=-math.expm1(log_kept) if upper else 0.0,
            error=float(np.dot(size, sensitivity)) + dropped + beyond + arithmetic,
            rounding=abs(float(mean)) * 1e-3,
            scale=math.expm1(min(scale_rounding, 600.0)),
            upper=upper,
        )

    def _normalised(self, epsilon: float) -> float:
        """The trapezoid rule; the integrand's values come in conjugate pairs."""
        return float(np.dot(self._terms, np.exp(-1j * ((epsilon - self._mean) * self._frequencies))).real)
