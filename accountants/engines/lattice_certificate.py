"""Certified bounds for one composition in one direction: choose the window, build the laws, refine until tight.

The window's tilt, width and resolution affect tightness only; whatever they are, the bounds are sound.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from accountants.best_moment import best_moment
from accountants.components.component import Direction, LossPair
from accountants.engines.composition import ComposedLaw, StepSpectrum, Window, combined
from accountants.engines.lattice import LatticeLaw, dominated, dominating
from accountants.engines.periodic import chernoff_widths
from accountants.engines.renyi_bound import log_delta_score
from accountants.engines.sketch import Sketch
from accountants.reduction.normal_form import NormalForm

RELATIVE_WIDTH = 2e-5  # of the interval for epsilon: where refinement stops
RELATIVE_WIDTH_DELTA = 1e-3  # of the interval for delta
COARSEST, FINEST = 2**12, 2**19  # lattice points in the window
_TAIL_SHARE = 1e-5  # of delta, spent on each step's truncated tails, all steps together
_WRAP_SHARE = 1e-6  # of delta, allowed to wrap around the window
_ROUNDING_SHARE = 1e-7  # of delta, aimed at for rounding: T steps at 1e-14 each, scaled by the tilt
_LEAST_LOG_DELTA = -690.0  # a delta below 1e-300 is left to the Renyi bound
_FINEST_SPACING = 1e-11  # of epsilon: beyond, doubles do not tell lattice points apart
_MOST_SEPARATE = 8  # components whose spectra are kept apart, so that counts may change


Side = Literal["upper", "lower", "attained"]
Discretisation = Callable[[LossPair, float, tuple[float, float], float], LatticeLaw]


@dataclasses.dataclass(frozen=True)
class Laws:
    """Bounds on one composition from both sides, at one resolution.

    Attributes:
        upper: laws that dominate the dominating pairs.
        lower: laws that the dominating pairs dominate: how fine the resolution is.
        attained: laws that the witnesses dominate (mostly `lower` itself): what the truth is not below; None if some
            component has no witness.
        fixed_counts: the counts that were composed already, if they were.
    """

    window: Window
    upper: tuple[StepSpectrum, ...]
    lower: tuple[StepSpectrum, ...]
    attained: tuple[StepSpectrum, ...] | None
    fixed_counts: tuple[int, ...] | None

    def composed(self, counts: Sequence[int], side: Side) -> ComposedLaw:
        """The composed law for these counts."""
        spectra = {"upper": self.upper, "lower": self.lower, "attained": self.attained}[side]
        assert spectra is not None, "some component has no witness"
        if self.fixed_counts is not None:
            assert tuple(counts) == self.fixed_counts, "these spectra are already composed"
            counts = [1]
        return ComposedLaw(spectra, counts, self.window, upper=side == "upper")


def build(form: NormalForm, direction: Direction, delta: float, window: Window) -> Laws:
    """Both sides' laws of every component on `window`, for about `delta`."""
    counts = [count for _, count in form.counts]
    tail = tail_mass(form, delta)

    def side(discretise: Discretisation, pairs: Sequence[LossPair]) -> tuple[StepSpectrum, ...]:
        spectra = (
            StepSpectrum.of(discretise(pair, window.spacing, _dense(pair, window, tail), tail), window)
            for pair in pairs
        )
        return tuple(spectra) if is_separable(form) else (combined(spectra, counts),)

    pairs = pairs_of(form, direction)
    upper, lower = side(dominating, pairs), side(dominated, pairs)
    witnesses = [pair for component, _ in form.counts if (pair := component.witness(direction)) is not None]
    attained: tuple[StepSpectrum, ...] | None = None
    if witnesses == pairs:
        attained = lower
    elif len(witnesses) == len(pairs):
        attained = side(dominated, witnesses)
    return Laws(window, upper, lower, attained, None if is_separable(form) else tuple(counts))


def pairs_of(form: NormalForm, direction: Direction) -> list[LossPair]:
    """The dominating pair of each component, all of which must have one."""
    pairs = [pair for pair in (component.pair(direction) for component, _ in form.counts) if pair is not None]
    assert len(pairs) == len(form.counts), "some component is known by its moments only"
    return pairs


def tail_mass(form: NormalForm, delta: float) -> float:
    """P-mass that one step's tails may lose."""
    return max(delta * _TAIL_SHARE / sum(count for _, count in form.counts), 1e-300)


def is_separable(form: NormalForm) -> bool:
    """Whether laws built for `form` serve other counts too."""
    return len(form.counts) <= _MOST_SEPARATE


def _dense(pair: LossPair, window: Window, tail: float) -> tuple[float, float]:
    """The losses of one step that the tilted composition sees: all, or a window around their tilted mean."""
    low, high = pair.tails(tail)
    if high - low <= 4 * window.width:
        return low - window.width, high + window.width
    sketch = Sketch([(pair, 1)], tail)
    nearby = window.tilt * np.array([1 - 1e-3, 1 + 1e-3])
    below, above = sketch.log_moments(nearby)
    mean = float((above - below) / (nearby[1] - nearby[0]))
    return mean - window.width, mean + window.width


def place(sketch: Sketch, form: NormalForm, epsilon: float, delta: float, size: int) -> Window:
    """The narrowest window that wraps and rounds little, for answers near (epsilon, delta)."""
    log_delta = math.log(delta)
    saddle, _ = best_moment(lambda t: sketch.log_delta_score(t, epsilon))
    trial = np.geomspace(1e-6, 64, 49)
    mild = trial[sketch.log_moments(trial) <= 5.0]
    top = max(8 * saddle, 2 * float(mild[-1]) if len(mild) else 0.0)
    t = np.geomspace(min(saddle, top / 8) / 30, top, 49)
    log_mass = sketch.log_moments(t)
    width, extras = chernoff_widths(t, log_mass, epsilon, -log_delta - math.log(_WRAP_SHARE))
    noise = log_mass - t * epsilon - log_delta
    budget = max(math.log(_ROUNDING_SHARE / 1e-14 / sum(c for _, c in form.counts)), float(noise.min()) + 1)
    best = int(np.argmin(np.where(noise <= budget, width, np.inf)))
    tilt, extra = float(t[best]), float(extras[best])
    return Window(tilt, max(extra, tilt * 1e-3), _fitted(form, float(width[best]), size), size)


def _fitted(form: NormalForm, width: float, size: int) -> float:
    """A width not below `width` whose lattice divides the support of the commonest law with atoms, if any."""
    pairs = zip(pairs_of(form, "remove"), (count for _, count in form.counts), strict=True)
    atoms = [(count, pair.support) for pair, count in pairs if pair.has_atoms]
    if not atoms:
        return width
    _, (least, most) = max(atoms)
    cells = math.floor((most - least) * size / width)
    cells -= cells % 2  # atoms in the middle of the support fit too
    return (most - least) * size / cells if cells >= 1 else width


def sketch_of(form: NormalForm, direction: Direction, delta: float) -> Sketch:
    """A sketch of the dominating composition, its tails cut as for `delta`."""
    counts = [count for _, count in form.counts]
    return Sketch(list(zip(pairs_of(form, direction), counts, strict=True)), tail_mass(form, delta))


class LatticeCertificate:
    """Bounds on epsilon for compositions of given components, up to given counts, at one delta, in one direction.

    Args:
        form: the components, with the greatest counts that will be asked about.
        direction: which pair.
        delta: of every question.
    """

    def __init__(self, form: NormalForm, direction: Direction, delta: float) -> None:
        self._form, self._direction, self._delta = form, direction, delta
        self._counts = [count for _, count in form.counts]
        self._sketch = sketch_of(form, direction, delta)
        _, guess = best_moment(lambda t: self._sketch.epsilon_score(t, delta))
        self._guess = max(guess, 0.0)
        self._ceiling = 1.001 * guess if guess > 0 else 1.0  # where to stop looking; it need not be a bound

    def upper(self, counts: Sequence[int], ceiling: float) -> float:
        """Upper bound on epsilon, at most `ceiling`, which must itself be an upper bound."""
        laws = self._fine
        if laws is None:
            return ceiling
        limit = min(ceiling, 2 * self._ceiling)  # the Renyi bound is infinite where an infinite loss is possible
        bound = laws.composed(counts, "upper").epsilon(self._delta, limit)
        return bound if bound < limit else ceiling

    def lower(self, counts: Sequence[int], ceiling: float) -> float:
        """Lower bound on epsilon, searched below `ceiling`."""
        laws = self._fine
        if laws is None or laws.attained is None:
            return 0.0
        return laws.composed(counts, "attained").epsilon(self._delta, min(ceiling, 2 * self._ceiling))

    def is_below(self, counts: Sequence[int], epsilon: float) -> bool:
        """Whether the coarse laws already prove that epsilon at this delta is at most `epsilon`."""
        laws = self._coarse
        return laws is not None and laws.composed(counts, "upper").log_delta(epsilon) <= math.log(self._delta)

    @functools.cached_property
    def _coarse(self) -> Laws | None:
        """Laws on the coarsest lattice, in a window placed by themselves; None where doubles overflow."""
        if not self._guess < math.inf:
            return None
        guess = self._guess
        for _ in range(8):
            laws = self._build(guess, COARSEST)
            if laws is None:
                return None
            upper = laws.composed(self._counts, "upper").epsilon(self._delta, self._ceiling)
            if upper > 0.8 * guess:
                break
            guess = max(upper, guess / 20)
        return laws

    @functools.cached_property
    def _fine(self) -> Laws | None:
        """Laws fine enough for RELATIVE_WIDTH at the greatest counts, or as fine as they get."""
        laws = self._coarse
        if laws is None:
            return None
        lower, upper = self._interval(laws)
        while upper > 0 and upper - lower > RELATIVE_WIDTH * upper and laws.window.size < FINEST:
            # Second order: the width falls as 1 / size^2, once the lattice resolves the law at all.
            wanted = laws.window.size * math.sqrt(1.5 * (upper - lower) / (RELATIVE_WIDTH * upper))
            size = 2 ** math.ceil(math.log2(min(wanted, 16 * laws.window.size, FINEST)))
            finer = self._build(min(upper, self._guess), max(size, 2 * laws.window.size))
            if finer is None:
                break
            laws = finer
            lower, upper = self._interval(laws)
        return laws

    def _interval(self, laws: Laws) -> tuple[float, float]:
        upper = laws.composed(self._counts, "upper").epsilon(self._delta, self._ceiling)
        return laws.composed(self._counts, "lower").epsilon(self._delta, upper), upper

    def _build(self, epsilon: float, size: int) -> Laws | None:
        window = place(self._sketch, self._form, epsilon, self._delta, size)
        if window.spacing < _FINEST_SPACING * epsilon:
            return None
        return build(self._form, self._direction, self._delta, window)


def log_delta_interval(form: NormalForm, direction: Direction, epsilon: float, known: float) -> tuple[float, float]:
    """Bounds on log delta at epsilon; refined only while they may exceed `known`."""
    _, upper = best_moment(log_delta_score(form, [direction], epsilon))
    lower = attained = -math.inf
    counts = [count for _, count in form.counts]
    size = 2 * COARSEST
    guess = min(upper, math.log(0.5))
    while upper > max(known, _LEAST_LOG_DELTA) and size <= FINEST:
        delta = math.exp(guess)
        window = place(sketch_of(form, direction, delta), form, epsilon, delta, size)
        if window.spacing < _FINEST_SPACING * epsilon:
            break
        laws = build(form, direction, delta, window)
        lower = max(lower, laws.composed(counts, "lower").log_delta(epsilon))
        if laws.attained is not None:
            attained = max(attained, laws.composed(counts, "attained").log_delta(epsilon))
        upper = min(upper, laws.composed(counts, "upper").log_delta(epsilon))
        if upper - lower <= RELATIVE_WIDTH_DELTA:
            break
        if upper < guess - 3:  # the window was for another delta
            guess = upper
        else:
            size *= 4
    return min(attained, upper), upper
