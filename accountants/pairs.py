"""The two laws that one step is judged by, as masses between levels of the privacy loss.

A pair (P, Q) with loss l = log dP/dQ. "remove": P = (1 - q) A(0) + q A(1), Q = A(0); "add" swaps the two, so its
loss is the negative. Everything that a discretisation needs is the mass that P and Q put between given losses.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import special

from accountants.normal_form import Component
from accountants.renyi import Array, Direction


@dataclasses.dataclass(frozen=True)
class LossPair:
    """One component seen in one direction."""

    component: Component
    direction: Direction

    @property
    def support(self) -> tuple[float, float]:
        """Least and greatest loss, possibly infinite."""
        low, high = _support(self.component)
        return (low, high) if self.direction == "remove" else (-high, -low)

    @property
    def has_atoms(self) -> bool:
        """Whether P and Q have point masses at both ends of the support (Laplace) and no other."""
        return self.component.noise == "laplace"

    def tails(self, mass: float) -> tuple[float, float]:
        """(low, high) such that P puts at most about `mass` below low and above high."""
        if self.has_atoms:
            return self.support
        q, scale = self.component.rate, self.component.scale
        deviations = -float(special.ndtri(mass))
        if self.direction == "remove":
            return _loss(q, scale, -deviations * scale), _loss(q, scale, 1 + deviations * scale)
        return -_loss(q, scale, deviations * scale), -_loss(q, scale, -deviations * scale)

    def cells(self, levels: Array) -> tuple[Array, Array]:
        """Masses of P and Q between consecutive loss levels.

        Args:
            levels: increasing losses, shape [B + 1]; the ends may be infinite.

        Returns:
            (P, Q), shape [B] each: the half-open cells (levels[i], levels[i + 1]] for removing, [ , ) for adding,
            but that the ends of the support belong to the cells that touch them from inside.
        """
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


def _support(component: Component) -> tuple[float, float]:
    rate, scale = component.rate, component.scale
    floor = -math.inf if rate == 1 else math.log1p(-rate)
    if component.noise == "gaussian":
        return floor, math.inf
    ends = np.array([-1 / scale, 1 / scale])
    if rate < 1:
        ends = np.logaddexp(floor, math.log(rate) + ends)
    return float(ends[0]), float(ends[1])


def _gaussian_cells(component: Component, levels: Array) -> tuple[Array, Array]:
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


def _laplace_cells(component: Component, levels: Array) -> tuple[Array, Array]:
    rate, reach = component.rate, 1 / component.scale
    u = np.clip(_unsampled_loss(rate, levels), -reach, reach)
    low, width = u[:-1], np.diff(u)
    absent = 0.5 * np.exp(-(low + reach) / 2) * -np.expm1(-width / 2)
    present = 0.5 * np.exp((low - reach) / 2) * np.expm1(width / 2)
    least, most = _support(component)
    at_least = (levels[:-1] <= least) & (levels[1:] > least)
    at_most = (levels[:-1] < most) & (levels[1:] >= most)
    far = 0.5 * math.exp(-reach)
    absent += 0.5 * at_least + far * at_most
    present += far * at_least + 0.5 * at_most
    return (1 - rate) * absent + rate * present, absent
