"""The loss of one Poisson-sampled Gaussian step as weighted nodes, exact for what a composition asks of it.

With x the outcome, u = (2 x - 1) / (2 s^2), l(x) = log(1 - q + q e^u) and phi the density of N(0, s^2),

    remove:  M(z) = int phi e^((1 + z) l) dx        L = l          P the mixture
    add:     M(z) = int phi e^(-z l) dx             L = -l         P the noise alone

over outcomes between two quantiles of P; what lies beyond is `cut`. Each panel of Gauss-Legendre nodes is short enough
for its integrand at z = t + i w, w up to a limit, by the bound on a Bernstein ellipse [1, Theorem 19.3]:

    error <= (64/15) (length / 2) sup |f| rho^(-2 n) / (1 - rho^-2),

sup |f| over the ellipse from |1 - q + q e^(u + i b)| <= 1 - q + q e^u (and >= cos(b / 2) times that), and the phase of
that number, which grows with u.

For frequencies beyond the limit, the part of the law on x > c, of tilted mass p, has by one integration by parts

    |int over x > c of r dl e^(i w l)| <= (r(c) + total variation of r) / w,    r = density of x over l'(x),

so that |M(t + i w)| / M(t) <= 1 - p + variation / w, for every c. log r has at most three stationary points (its
slope is -x / s^2 plus a multiple of a logistic function), so its variation is at most 4 times its maximum beyond c.

References:
    [1] Trefethen, Approximation Theory and Approximation Practice, 2013.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from accountants.components.component import Array, Direction
from accountants.components.sampled_noise import SampledNoise

_ORDER = 20  # nodes in a panel
_LEAST_SHARE = 1e-6  # of 1 - q + q e^u: below it, the other form is used
_FAR = 30.0  # exponent above which 1 - q is lost beside q e^u
_RHO = 4.0  # of the Bernstein ellipse
_ALONG, _ACROSS = (_RHO + 1 / _RHO) / 2, (_RHO - 1 / _RHO) / 2  # its half axes, of half a panel
MOST_PANELS = 2**16
ACCURACY = 1e-21  # of the quadrature, relative to M(t)
_ACCURACY_EXTRA = 1e-9  # relative to M(t + s)
_PHASE = 10.0  # of the integrand across a panel, about
_WIDEST = 1.5  # panel, in units of s^2: keeps the ellipse where |Im u| < pi / 2


Precision = Literal["double", "extended"]
Reals = NDArray[np.floating[Any]]
TYPES: dict[str, type[np.floating[Any]]] = {"double": np.float64, "extended": np.longdouble}
PI = "3.14159265358979323846264338327950288"


@dataclasses.dataclass(frozen=True)
class LossNodes:
    """One step's loss as nodes: the sum of e^(log_weight + t loss) is M(t) without what was cut.

    In double or, where the platform has it, in extended precision: all arrays are of one type.

    Attributes:
        loss: shape [J].
        log_weight: log of P's weight at each node, shape [J].
        loss_units: bound on the relative error of each loss, in units of rounding, shape [J].
        weight_units: bound on the error of each log_weight, likewise.
        log_ratio: log of P's density of outcomes over |dl/dx| at each node, shape [J].
        reach: how much log_ratio + t loss may rise towards the next node, at most reach[0] + t reach[1], shape [2, J].
        cut: P-mass beyond the nodes, both sides.
    """

    loss: Reals
    log_weight: Reals
    loss_units: Array
    weight_units: Array
    log_ratio: Array
    reach: Array
    cut: float

    def log_moments(self, t: Array) -> Array:
        """log M at real t, shape [M]."""
        exponents = np.multiply.outer(t, self.loss)
        exponents += self.log_weight
        top = exponents.max(axis=1)
        exponents -= top[:, None]
        np.exp(exponents, out=exponents)
        moments: Array = top + np.log(exponents.sum(axis=1))
        return moments

    def tilted(self, t: float) -> tuple[Reals, float]:
        """Weights under the tilt, with sum 1, and log M(t)."""
        exponents = self.log_weight + t * self.loss
        top = exponents.max()
        weights = np.exp(exponents - top)
        total = weights.sum()
        return weights / total, float(top + np.log(total))

    def decay(self, t: float) -> tuple[Array, Array]:
        """(p, variation), shape [panels] each: |M(t + i w)| <= M(t) (1 - p + variation / w), for each of them."""
        exact, log_mass = self.tilted(t)
        weights, loss = exact.astype(np.float64), self.loss.astype(np.float64)
        mass: Array = np.cumsum(weights.reshape(-1, _ORDER).sum(axis=1)[::-1])[::-1]
        log_ratio = self.log_ratio + t * loss - log_mass + self.reach[0] + t * self.reach[1]
        highest = np.maximum.accumulate(log_ratio.reshape(-1, _ORDER).max(axis=1)[::-1])[::-1]
        mass[0] = 1.0
        return np.clip(mass - 1e-12, 0.0, 1.0), 4 * np.exp(np.minimum(highest, 600.0))


@functools.lru_cache(maxsize=2)
def _panel(kind: np.dtype[np.floating[Any]]) -> tuple[Reals, Reals]:
    """Gauss-Legendre nodes and weights on [-1, 1], to the precision of the type."""
    x = np.polynomial.legendre.leggauss(_ORDER)[0].astype(kind)
    for _ in range(3):  # Newton, from double precision
        before, here = np.ones_like(x), x
        for k in range(2, _ORDER + 1):
            before, here = here, ((2 * k - 1) * x * here - (k - 1) * before) / k
        slope = _ORDER * (x * here - before) / (x * x - 1)
        x = x - here / slope
    return x, 2 / ((1 - x * x) * slope**2)


@functools.lru_cache(maxsize=64)
def loss_nodes(
    component: SampledNoise,
    direction: Direction,
    tail_mass: float,
    tilt: float,
    extra: float,
    frequency: float,
    most_panels: int = MOST_PANELS,
    precision: Precision = "double",
) -> LossNodes | None:
    """Nodes good for M(t + i w) at |w| up to `frequency`, and for M(t + s); None if it would take too many.

    Args:
        component: Gaussian.
        direction: which pair.
        tail_mass: P-mass that may be cut, each side.
        tilt: t >= 0.
        extra: s >= 0; M(t + s) is good to 1e-9.
        frequency: greatest |w|, in radians per unit of loss.
        most_panels: of 20 nodes each.
        precision: of the nodes.
    """
    assert component.noise == "gaussian"
    step = _Step(component.rate, component.scale, direction, np.float64)
    precise = _Step(component.rate, component.scale, direction, TYPES[precision])
    low, high = _range(component, direction, tail_mass)
    finer = 1.0
    while (edges := step.edges(low, high, tilt, frequency, finer, most_panels)) is not None:
        nodes = precise.nodes(edges)
        log_mass, log_mass_extra = nodes.log_moments(np.array([tilt, tilt + extra]))
        error = step.log_quadrature_error(edges, tilt, frequency) - log_mass
        error_extra = step.log_quadrature_error(edges, tilt + extra, 0.0) - log_mass_extra
        if error <= math.log(ACCURACY) and error_extra <= math.log(_ACCURACY_EXTRA):
            return nodes
        finer *= 2
    return None


def _range(component: SampledNoise, direction: Direction, tail_mass: float) -> tuple[float, float]:
    """Outcomes beyond which P has at most `tail_mass` each side."""
    rate, scale = component.rate, component.scale
    deviations = -float(special.ndtri(tail_mass / 2)) * scale
    if direction == "add":
        return -deviations, deviations
    of_present = tail_mass / (2 * rate)
    present = 1 - float(special.ndtri(of_present)) * scale if of_present < 0.5 else 0.0
    return -deviations, max(deviations, present) if rate < 1 else present


@dataclasses.dataclass(frozen=True)
class _Step:
    rate: float
    scale: float
    direction: Direction
    number: type[np.floating[Any]]

    def loss(self, x: Reals) -> Reals:
        """l(x) without cancellation where q e^u is small."""
        u, rate = self._exponent(x), self.number(self.rate)
        loss: Reals = np.log1p(np.maximum(rate * np.expm1(np.minimum(u, _FAR)), _LEAST_SHARE - 1))
        # Where 1 - q is lost beside q e^u, or q e^u beside 1 - q is what is left of it.
        far = (u > _FAR) | ((u < -1) & (self.rate > 0.5))
        if far.any():
            log_absent = np.log1p(-rate) if self.rate < 1 else self.number(-math.inf)
            loss[far] = np.logaddexp(log_absent, np.log(rate) + u[far])
        return loss

    def _exponent(self, x: Reals) -> Reals:
        exponent: Reals = (2 * x - 1) / (2 * self.number(self.scale) ** 2)
        return exponent

    def _log_present(self, x: Reals) -> Reals:
        """log of q e^u / (1 - q + q e^u)."""
        log_present: Reals = np.log(self.number(self.rate)) + self._exponent(x) - self.loss(x)
        return log_present

    def edges(
        self, low: float, high: float, tilt: float, frequency: float, finer: float, most_panels: int
    ) -> Array | None:
        """Ends of panels, shorter where the integrand turns faster; None if there would be too many."""
        square = self.scale**2
        coarse = np.linspace(low, high, 1025)
        turning = np.abs(coarse) + (1 + tilt + frequency) * np.exp(self._log_present(coarse + square))
        widest = _WIDEST * square / 1.2
        if self.direction == "add":
            widest /= math.sqrt(1 + tilt / 8)  # |1 - q + q e^(u + i b)|^-t grows as e^(t b^2 / 8)
        density = finer * np.maximum(max(1 / self.scale, 1 / widest), turning / (square * _PHASE))
        count = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(coarse))])
        if not count[-1] <= most_panels:
            return None
        panels = math.ceil(count[-1])
        edges: Array = np.interp(np.linspace(0, count[-1], panels + 1), count, coarse)
        return edges

    def log_quadrature_error(self, edges: Array, tilt: float, frequency: float) -> float:
        """log of a bound on the error of M(t + i w), |w| <= frequency."""
        half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
        square = self.scale**2
        along, across = _ALONG * half, _ACROSS * half
        turn = across / square
        if turn.max() >= math.pi / 2:
            return math.inf
        nearest = np.maximum(np.abs(middle) - along, 0.0)
        log_phi = (across**2 - nearest**2) / (2 * square) - math.log(self.scale * math.sqrt(2 * math.pi))
        upper_loss, lower_loss = self.loss(middle + along), self.loss(middle - along)
        if self.direction == "remove":
            log_size = log_phi + upper_loss + tilt * np.maximum(upper_loss, 0.0)
        else:
            log_size = log_phi + tilt * np.maximum(-lower_loss - np.log(np.cos(turn / 2)), 0.0)
        present = np.exp(self._log_present(middle + along))
        log_size += frequency * np.arctan2(present * np.sin(turn), 1 - present + present * np.cos(turn))
        log_factor = math.log(64 / 15 / (1 - _RHO**-2)) - 2 * _ORDER * math.log(_RHO)
        log_error = float(np.logaddexp.reduce(log_size + np.log(half))) + log_factor
        return log_error

    def nodes(self, edges: Array) -> LossNodes:
        """Gauss-Legendre nodes of all panels."""
        panel_x, panel_w = _panel(np.dtype(self.number))
        half = np.diff(edges.astype(self.number))[:, None] / 2
        x = (edges[:-1, None] + half * (1 + panel_x)).ravel()
        loss, u, scale = self.loss(x), self._exponent(x), self.number(self.scale)
        log_density = -x * x / (2 * scale**2) - np.log(scale * np.sqrt(2 * self.number(PI)))
        if self.direction == "remove":
            log_density += loss
        log_width = np.log((half * panel_w).ravel())
        square = self.scale**2
        log_slope = np.log(self.number(self.rate)) + u - loss - math.log(square)
        loss_units = 8 + 2 * np.abs(u).astype(np.float64)  # the rounding of u, seen through e^u
        weight_units = 8 + 4 * (x * x / (2 * square) - log_width).astype(np.float64) + loss_units * np.abs(loss)
        x = x.astype(np.float64)
        # Between nodes a function rises above both by at most gap^2 / 8 times its curvature downwards, which is at
        # most 1 / s^2 here (adding: + t / (4 s^4)); at the ends of the range, by its slope.
        gap = np.maximum(np.diff(x, append=edges[-1]), np.diff(x, prepend=edges[0]))
        reach = np.stack([gap**2 / (8 * square), gap**2 / (32 * square**2) * (self.direction == "add")])
        for end, outermost in ((0, edges[0]), (-1, edges[-1])):
            reach[:, end] += abs(x[end] - outermost) / square * np.array([abs(outermost) + 3, 1.0])
        low, high = float(edges[0]), float(edges[-1])
        sign = 1.0 if self.direction == "remove" else -1.0
        log_ratio = (log_density - log_slope).astype(np.float64)
        log_weight = log_density + log_width
        cut = self._cut(low, high)
        return LossNodes(sign * loss, log_weight, loss_units, weight_units.astype(np.float64), log_ratio, reach, cut)

    def _cut(self, low: float, high: float) -> float:
        absent = special.ndtr(low / self.scale) + special.ndtr(-high / self.scale)
        present = special.ndtr((low - 1) / self.scale) + special.ndtr((1 - high) / self.scale)
        share = self.rate if self.direction == "remove" else 0.0
        return float((1 - share) * absent + share * present) * (1 + 1e-12)
