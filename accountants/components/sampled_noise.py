"""Gaussian or Laplace noise on a Poisson-sampled sum: the mechanism of DP-SGD, in closed form.

"remove": P = (1 - q) A(0) + q A(1), Q = A(0), with A(m) the noise centred at m; "add" swaps the two, so its loss is
the negative. The loss increases with the outcome, so masses between losses are masses between outcomes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
from scipy import special

from accountants.components import shift_mixture_moments
from accountants.components.component import Array, Component, Direction, LossPair
from accountants.components.shift_mixture_law import Mixture

Noise = Literal["gaussian", "laplace"]


@dataclasses.dataclass(frozen=True)
class SampledNoise(Component):
    """Noise of one kind, seen through Poisson sampling: the pair (1 - q) A(0) + q A(1) against A(0).

    Attributes:
        noise: the family A; A(m) is centred at m.
        scale: standard deviation (Gaussian) or scale b (Laplace) over the sensitivity, > 0.
        rate: q in (0, 1].
    """

    noise: Noise
    scale: float
    rate: float

    @property
    def is_plain_gaussian(self) -> bool:
        """Whether this is Gaussian noise without sampling."""
        return self.noise == "gaussian" and self.rate == 1

    def pair(self, direction: Direction) -> SampledNoisePair:
        """The pair itself: neighbours attain it."""
        return SampledNoisePair(self, direction)

    def log_moments(self, direction: Direction, t: Array) -> Array:
        """Closed form without sampling, else by quadrature (`shift_mixture_moments`), rounded up."""
        if self.is_plain_gaussian:
            return t * (t + 1) / 2 / self.scale / self.scale * (1 + shift_mixture_moments.SLACK)
        present = ((1.0, self.rate),) if self.rate == 1 else ((0.0, 1 - self.rate), (1.0, self.rate))
        mixture = Mixture.of(self.noise, self.scale, present, ((0.0, 1.0),))
        return shift_mixture_moments.log_moments(mixture if direction == "remove" else mixture.mirrored(), t)


@dataclasses.dataclass(frozen=True)
class SampledNoisePair(LossPair):
    """One component seen in one direction."""

    component: SampledNoise
    direction: Direction

    @property
    def support(self) -> tuple[float, float]:
        """Sampling bounds the loss on one side, Laplace noise on both."""
        low, high = _support(self.component)
        return (low, high) if self.direction == "remove" else (-high, -low)

    @property
    def has_atoms(self) -> bool:
        """Laplace noise has point masses at both ends of the support and no other."""
        return self.component.noise == "laplace"

    def tails(self, mass: float) -> tuple[float, float]:
        """Quantiles of the noise at `mass`; the support where it is bounded."""
        if self.has_atoms:
            return self.support
        q, scale = self.component.rate, self.component.scale
        deviations = -float(special.ndtri(mass))
        if self.direction == "remove":
            return _loss(q, scale, -deviations * scale), _loss(q, scale, 1 + deviations * scale)
        return -_loss(q, scale, deviations * scale), -_loss(q, scale, -deviations * scale)

    def log_tail(self, loss: float) -> tuple[float, float, float]:
        """In log space for Gaussian noise, where masses underflow long before they stop to matter."""
        if self.has_atoms:
            return super().log_tail(loss)
        q, scale = self.component.rate, self.component.scale
        sign = 1.0 if self.direction == "remove" else -1.0
        z = scale * float(_unsampled_loss(q, np.array([sign * loss]))[0]) + 0.5 / scale
        log_absent = float(special.log_ndtr(-sign * z))
        log_present = float(special.log_ndtr(-sign * (z - 1 / scale)))
        if q < 1:
            log_present = float(np.logaddexp(math.log1p(-q) + log_absent, math.log(q) + log_present))
        log_p, log_q = (log_present, log_absent) if self.direction == "remove" else (log_absent, log_present)
        return log_p, log_q, log_q

    def cells(self, levels: Array) -> tuple[Array, Array]:
        """Half-open cells: (low, high] for removing, [low, high) for adding."""
        masses = _gaussian_cells if self.component.noise == "gaussian" else _laplace_cells
        if self.direction == "remove":
            return masses(self.component, levels)
        p, q = masses(self.component, -levels[::-1])
        return q[::-1], p[::-1]


def _loss(rate: float, scale: float, x: float) -> float:
    """Loss of removing at outcome x of Gaussian noise."""
    unsampled = (2 * x - 1) / (2 * scale * scale)
    return unsampled if rate == 1 else float(np.logaddexp(math.log1p(-rate), math.log(rate) + unsampled))


def _unsampled_loss(rate: float, loss: Array) -> Array:
    """log A(1)/A(0) where the mixture's loss is `loss`: the inverse of log(1 - q + q e^u); -inf at and below it."""
    if rate == 1:
        return loss
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inner = np.log1p(np.maximum(np.expm1(np.minimum(loss, 700.0)) / rate, -1.0))
    # For large losses 1 - q is lost beside e^loss.
    return np.where(loss > 40, loss - math.log(rate), np.where(loss <= math.log1p(-rate), -np.inf, inner))


def _support(component: SampledNoise) -> tuple[float, float]:
    rate, scale = component.rate, component.scale
    floor = -math.inf if rate == 1 else math.log1p(-rate)
    if component.noise == "gaussian":
        return floor, math.inf
    ends = np.array([-1 / scale, 1 / scale])
    if rate < 1:
        ends = np.logaddexp(floor, math.log(rate) + ends)
    return float(ends[0]), float(ends[1])


def _gaussian_cells(component: SampledNoise, levels: Array) -> tuple[Array, Array]:
    rate, scale = component.rate, component.scale
    z = scale * _unsampled_loss(rate, levels) + 0.5 / scale  # outcome / scale
    absent, present = _normal_masses(z), _normal_masses(z - 1 / scale)
    return (1 - rate) * absent + rate * present, absent


def _normal_masses(z: Array) -> Array:
    """Standard normal mass between consecutive z, without cancellation in either tail."""
    tail = special.ndtr(-np.abs(z))
    left, right = tail[:-1], tail[1:]
    both_sides = (z[:-1] < 0) & (z[1:] > 0)
    masses: Array = np.where(both_sides, 1 - left - right, np.abs(right - left))
    return masses


def _laplace_cells(component: SampledNoise, levels: Array) -> tuple[Array, Array]:
    rate, reach = component.rate, 1 / component.scale
    u = np.clip(_unsampled_loss(rate, levels), -reach, reach)
    low, high, share = u[:-1], u[1:], -np.expm1(-np.diff(u) / 2)
    absent = 0.5 * np.exp(-(low + reach) / 2) * share
    present = 0.5 * np.exp((high - reach) / 2) * share
    least, most = _support(component)
    at_least = (levels[:-1] <= least) & (levels[1:] > least)
    at_most = (levels[:-1] < most) & (levels[1:] >= most)
    far = 0.5 * math.exp(-reach)
    absent += 0.5 * at_least + far * at_most
    present += far * at_least + 0.5 * at_most
    # Levels beyond the support may have been rounded to just inside it.
    outside = (levels[:-1] > most) | (levels[1:] < least)
    absent[outside] = present[outside] = 0.0
    return (1 - rate) * absent + rate * present, absent
