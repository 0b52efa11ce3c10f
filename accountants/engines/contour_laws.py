"""Choosing the line on which a composition of sampled Gaussians is inverted, and what is built on it.

The choice affects tightness only. None where inverting would take too many frequencies: few steps, or rare ones whose
common losses are far smaller than the rest. There the lattice takes over (`lattice_certificate`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from accountants.components.component import Array, Direction
from accountants.components.sampled_noise import SampledNoise
from accountants.engines import contour
from accountants.engines.contour import ContourSum, Line, StepTransform
from accountants.engines.periodic import chernoff_widths
from accountants.engines.quadrature import LossNodes, Precision, loss_nodes
from accountants.engines.thinning import Steps, thinned
from accountants.reduction.normal_form import NormalForm

_CUT_SHARE = 1e-7  # of delta, for each side's far tails of all steps
_LOST_SHARE = 1e-8  # of delta, for frequencies beyond the last
_WRAP_SHARE = 1e-8  # of delta, for the periodic sum's other terms
_NOISE_SHARE = 1e-8  # of delta, aimed at for rounding
_STEP_ROUNDING = 1e-14  # of one step: what is reckoned with in choosing
_FIRST_TILT, _LAST_TILT = 24.0, 2e5  # up to which a tilt is looked for
_NOISIER = 8.0  # logs above the least rounding that a line may have, where rounding is what counts
_BEYOND = 12.0  # logs below delta that tilts must reach
_MOST_SURVEYED = 1500  # panels of 20 nodes
_CANDIDATES = 8  # lines to compare
MOST_SCALES = 32  # components that are taken as they are; of more, some stand for the others
_NODES, _NODES_OF_CHECK, _NODES_OF_SURVEY = 36, 28, 12


class Cumulants:
    """Log moments of a composition with its far tails cut, and where an answer is to be expected.

    Args:
        parts: nodes of each component with their counts.
        top: greatest tilt.

    Attributes:
        tilts: shape [72], increasing.
        log_mass: log moment of the composition at each.
    """

    def __init__(self, parts: Sequence[tuple[LossNodes, float]], top: float) -> None:
        self.tilts: Array = np.geomspace(top * 3e-6, top, 72, dtype=np.float64)
        self.log_mass = np.zeros(len(self.tilts))
        self._mean, self._variance = np.zeros_like(self.log_mass), np.zeros_like(self.log_mass)
        for nodes, count in parts:
            exponents = np.multiply.outer(self.tilts, nodes.loss) + nodes.log_weight
            highest = exponents.max(axis=1)
            exponents -= highest[:, None]
            weights = np.exp(exponents, out=exponents)
            total, first = weights.sum(axis=1), weights @ nodes.loss
            mean = first / total
            self.log_mass += count * (highest + np.log(total))
            self._mean += count * mean
            self._variance += count * np.maximum((weights @ nodes.loss**2) / total - mean**2, 1e-300)

    def expected(self, log_delta: float) -> float:
        """Epsilon at delta, to about a percent where many steps matter [1, Section 4]."""
        log_deltas = self._log_deltas()
        if log_deltas[0] <= log_delta:
            return 0.0
        return max(float(np.interp(-log_delta, -np.minimum.accumulate(log_deltas), self._mean)), 0.0)

    def best_tilt(self, epsilon: float) -> float:
        """The tilt at which Chernoff's bound on delta at epsilon is least."""
        return float(self.tilts[int(np.argmin(self.log_mass - self.tilts * epsilon))])

    @property
    def least_log_delta(self) -> float:
        """log delta at the greatest tilt."""
        return float(self._log_deltas()[-1])

    def expected_log_delta(self, epsilon: float) -> float:
        """log delta at epsilon, likewise."""
        return float(min(np.interp(epsilon, self._mean, self._log_deltas()), math.log(0.5)))

    def _log_deltas(self) -> Array:
        """By the saddle point: at tilt t, of the epsilon that is the tilted mean."""
        t = self.tilts
        normal = 0.5 * np.log(2 * math.pi * self._variance)
        # A saddle point of small deviation meets the pole at 0: beyond it, the Gaussian's own tail takes over.
        pole = np.maximum(normal + np.log(t), 0.0) - normal
        log_deltas: Array = self.log_mass - t * self._mean - np.maximum(pole + normal, 0.0) - np.log1p(t)
        return log_deltas


@dataclasses.dataclass(frozen=True)
class Terrain:
    """What a composition looks like before a line is chosen."""

    parts: tuple[tuple[LossNodes, float], ...]
    cumulants: Cumulants


def sampled_gaussians(form: NormalForm) -> Steps | None:
    """The components with their counts if all are Poisson-sampled Gaussians, None if not."""
    steps: Steps = []
    for component, count in form.counts:
        if not isinstance(component, SampledNoise) or component.noise != "gaussian":
            return None
        steps.append((component, float(count)))
    return steps


def survey(steps: Steps, direction: Direction, delta: float) -> Terrain | None:
    """Nodes and cumulants, tilts up to where delta is far below `delta`; None if that takes too many nodes."""
    terrain: Terrain | None = None
    top = _FIRST_TILT
    steps = thinned(steps, _NODES_OF_SURVEY)
    while top <= _LAST_TILT:
        parts: list[tuple[LossNodes, float]] = []
        for component, count in steps:
            nodes = loss_nodes(component, direction, tail_mass(steps, delta), top, 0.0, 0.0, _MOST_SURVEYED)
            if nodes is None:
                return terrain
            parts.append((nodes, count))
        terrain = Terrain(tuple(parts), Cumulants(parts, top))
        if terrain.cumulants.least_log_delta < math.log(delta) - _BEYOND:
            break
        top *= 8
    return terrain


@dataclasses.dataclass(frozen=True)
class ContourLaws:
    """Both sides' bounds on compositions of given components, from one set of transforms.

    Attributes:
        line: where they were computed.
        transforms: of each component.
        uncertainty: how much log M(t + i w) of the whole composition may be wrong besides, shape [count].
        fixed: counts that the transforms and the uncertainty belong to, if to no others.
    """

    line: Line
    transforms: tuple[StepTransform, ...]
    uncertainty: Array
    fixed: tuple[float, ...] | None

    @staticmethod
    def of(
        steps: Steps, direction: Direction, delta: float, line: Line, precision: Precision = "double"
    ) -> ContourLaws | None:
        """The steps' transforms on the line; None if that takes too many nodes."""
        exact = len(steps) <= MOST_SCALES
        transforms = _transforms(steps if exact else thinned(steps, _NODES), direction, delta, line, precision)
        if transforms is None:
            return None
        if exact:
            return ContourLaws(line, tuple(t for t, _ in transforms), np.zeros(line.count), None)
        check = _transforms(thinned(steps, _NODES_OF_CHECK), direction, delta, line, precision)
        if check is None:
            return None
        uncertainty = np.abs(_total(transforms, line) - _total(check, line))
        laws = tuple(t for t, _ in transforms)
        return ContourLaws(line, laws, uncertainty, tuple(weight for _, weight in transforms))

    def composed(self, counts: Sequence[float], *, upper: bool) -> ContourSum:
        """The periodic sum for these counts (for the fixed ones, if there are any)."""
        return ContourSum(self.transforms, self.fixed or counts, self.line, self.uncertainty, upper=upper)


def _transforms(
    steps: Steps, direction: Direction, delta: float, line: Line, precision: Precision
) -> list[tuple[StepTransform, float]] | None:
    result = []
    for component, count in steps:
        nodes = loss_nodes(
            component, direction, tail_mass(steps, delta), line.tilt, line.extra, line.last, precision=precision
        )
        if nodes is None:
            return None
        result.append((StepTransform.of(nodes, line), count))
    return result


def _total(transforms: list[tuple[StepTransform, float]], line: Line) -> NDArray[np.complex128]:
    """log M(t + i w) of the composition, shape [count], the phases continuous."""
    total = np.zeros(line.count, dtype=np.complex128)
    for transform, count in transforms:
        phases = 1j * line.frequencies(np.dtype(np.float64)) * float(transform.mean)
        total += count * (transform.log_mass + phases + transform.log_transform)
    return total


def tail_mass(steps: Steps, delta: float) -> float:
    """P-mass that each side of one step may lose."""
    return max(delta * _CUT_SHARE / sum(count for _, count in steps), 1e-300)


def place_line(terrain: Terrain, epsilon: float, delta: float, least: float) -> Line | None:
    """The cheapest line whose other terms, rounding and lost frequencies are all a small share of delta."""
    log_delta = math.log(delta)
    parts, cumulants = terrain.parts, terrain.cumulants
    t, log_mass = cumulants.tilts, cumulants.log_mass
    width, extra = chernoff_widths(t, log_mass, epsilon, -log_delta - math.log(_WRAP_SHARE))
    noise = log_mass - t * epsilon - log_delta  # log of what rounding is multiplied by
    steps = sum(count for _, count in parts)
    rounding = steps * _STEP_ROUNDING
    budget = math.log(_NOISE_SHARE / rounding)
    quiet = bool(noise.min() <= budget)
    usable = np.flatnonzero((noise <= (budget if quiet else noise.min() + _NOISIER)) & np.isfinite(width))
    smallest = [(nodes, max(count * least, 1.0)) for nodes, count in parts]
    best: Line | None = None
    for i in usable[np.argsort(width[usable] if quiet else noise[usable])][:_CANDIDATES]:
        last = contour.last_frequency(smallest, float(t[i]), math.log(_LOST_SHARE) - float(noise[i]))
        count = last * float(width[i]) / (2 * math.pi) + 2
        if count <= (best.count if best else contour.MOST_FREQUENCIES):
            best = Line(float(t[i]), float(extra[i]), float(width[i]), math.ceil(count))
            if not quiet:  # the quietest that will do, not the cheapest
                break
    return best
