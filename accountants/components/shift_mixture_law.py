"""Two mixtures of shifted noise, one on each side of 0: likelihood ratios, and where their mass is."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from scipy import special

from accountants.components import noise_laws
from accountants.components.component import Array
from accountants.components.noise_laws import DISCRETE, Noise

Weighted = tuple[tuple[float, float], ...]  # (shift, weight)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """P = sum of weight * A(shift) over `present`, Q the same over `absent`.

    Attributes:
        noise: the family A.
        scale: of discrete noise, in grid units; 1 for continuous noise, whose shifts are in units of its scale.
        present: (shift >= 0, weight).
        absent: (shift <= 0, weight).
    """

    noise: Noise
    scale: float
    present: Weighted
    absent: Weighted

    @staticmethod
    def of(noise: Noise, scale: float, present: Weighted, absent: Weighted) -> Mixture:
        """The mixture with all lengths in the same unit."""
        if noise in DISCRETE:
            return Mixture(noise, scale, present, absent)
        return Mixture(noise, 1.0, _divided(present, scale), _divided(absent, scale))

    def mirrored(self) -> Mixture:
        """Q against P, outcomes turned around: P is to the right of 0 again."""
        return Mixture(self.noise, self.scale, _divided(self.absent, -1.0), _divided(self.present, -1.0))

    @property
    def hull(self) -> tuple[float, float]:
        """The least and the greatest shift, <= 0 and >= 0."""
        return min(shift for shift, _ in self.absent), max(shift for shift, _ in self.present)

    @property
    def support(self) -> tuple[float, float]:
        """Least and greatest loss, or infinities."""
        if self.noise == "laplace":
            low, high = (float(loss) for loss in self.losses(np.array(self.hull)))
            return low, high
        unmoved_present = sum(weight for shift, weight in self.present if shift == 0)
        unmoved_absent = sum(weight for shift, weight in self.absent if shift == 0)
        # Far to the left P is its unmoved part, far to the right Q is.
        least = math.log(unmoved_present) if self.hull[0] == 0 and unmoved_present > 0 else -math.inf
        most = -math.log(unmoved_absent) if self.hull[1] == 0 and unmoved_absent > 0 else math.inf
        return least, most

    @property
    def reach(self) -> tuple[float, float]:
        """Outcomes between which all mass lies that is not 0 as a double; whole numbers for discrete noise."""
        low, high = self.hull
        match self.noise:
            case "discrete_gaussian":
                beyond = float(noise_laws.discrete_gaussian_reach(self.scale))
            case "skellam":
                beyond = float(noise_laws.skellam_reach(self.scale))
            case _:
                beyond = noise_laws.GAUSSIAN_REACH
        return low - beyond, high + beyond

    def gaussian_quantiles(self, mass: float) -> tuple[float, float]:
        """(low, high): of Gaussian noise, P puts at most `mass` below low, and at most that above high."""
        deviations = -float(special.ndtri(mass))
        return min(shift for shift, _ in self.present) - deviations, self.hull[1] + deviations

    def log_ratio(self, shift: float, x: Array) -> Array:
        """log A(shift) / A(0) at outcomes x, shape [N]."""
        match self.noise:
            case "gaussian":
                return noise_laws.gaussian_log_ratio(shift, x)
            case "laplace":
                return noise_laws.laplace_log_ratio(shift, x)
            case "discrete_gaussian":
                return noise_laws.discrete_gaussian_log_ratio(self.scale, shift, x)
            case "skellam":
                return noise_laws.skellam_log_ratio(self.scale, shift, x)

    def losses(self, x: Array) -> Array:
        """log P / Q at outcomes x, shape [N]."""
        return self.log_relative(self.present, x) - self.log_relative(self.absent, x)

    def log_relative(self, law: Weighted, x: Array) -> Array:
        """log of a mixture's likelihood ratio to A(0), shape [N]."""
        if len(law) == 1:
            return self.log_ratio(law[0][0], x)
        exponents = [self.log_ratio(shift, x) for shift, _ in law]
        top = functools.reduce(np.maximum, exponents)
        total = np.zeros(len(x))
        for exponent, (_, weight) in zip(exponents, law, strict=True):
            total += weight * np.exp(exponent - top)
        relative: Array = top + np.log(total)
        return relative

    def excess(self, law: Weighted, x: Array) -> Array:
        """A mixture's likelihood ratio to A(0), less 1, to full relative precision; inf where it overflows."""
        total = np.zeros(len(x))
        with np.errstate(over="ignore"):
            for shift, weight in law:
                total += weight * np.expm1(self.log_ratio(shift, x))
        return total

    def losses_and_slopes(self, x: Array) -> tuple[Array, Array]:
        """Losses of continuous noise at x and their derivatives, shape [N] each."""
        present, rise = self._relative_and_slope(self.present, x)
        absent, fall = self._relative_and_slope(self.absent, x)
        return present - absent, rise - fall

    def masses(self, law: Weighted, x: Array) -> Array:
        """Mass of a mixture of discrete noise at the integers x, shape [N]."""
        total = np.zeros(len(x))
        for shift, weight in law:
            total += weight * np.exp(self.log_pmf(x - shift))
        return total

    def log_pmf(self, x: Array) -> Array:
        """log mass of discrete noise A(0) at the integers x, shape [N]."""
        if self.noise == "skellam":
            return noise_laws.skellam_log_pmf(self.scale, x)
        return noise_laws.discrete_gaussian_log_pmf(self.scale, x)

    def _relative_and_slope(self, law: Weighted, x: Array) -> tuple[Array, Array]:
        if len(law) == 1:
            return self.log_ratio(law[0][0], x), self._slope(law[0][0], x)
        exponents = [self.log_ratio(shift, x) for shift, _ in law]
        top = functools.reduce(np.maximum, exponents)
        total, weighted = np.zeros(len(x)), np.zeros(len(x))
        for exponent, (shift, weight) in zip(exponents, law, strict=True):
            part = weight * np.exp(exponent - top)
            total += part
            weighted += part * self._slope(shift, x)
        return top + np.log(total), weighted / total

    def _slope(self, shift: float, x: Array) -> Array:
        """Derivative of log_ratio in x."""
        if self.noise == "gaussian":
            return np.full(len(x), shift)
        slope: Array = np.sign(x) - np.sign(x - shift)
        return slope


def _divided(law: Weighted, unit: float) -> Weighted:
    # + 0.0: a shift of 0 stays positive, so that equal laws are equal values.
    return tuple((shift / unit + 0.0, weight) for shift, weight in law)
