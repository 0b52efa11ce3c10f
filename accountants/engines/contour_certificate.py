"""Certified bounds for compositions of Poisson-sampled Gaussians in one direction, by inverting along a line.

An answer is given only if its interval is narrow; otherwise None, and the lattice is asked (`lattice_certificate`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from accountants.components.component import Direction
from accountants.engines.contour import Line
from accountants.engines.contour_laws import ContourLaws, Terrain, place_line, sampled_gaussians, survey
from accountants.engines.renyi_bound import composed_log_moments, log_delta_proved
from accountants.engines.thinning import Steps
from accountants.reduction.normal_form import NormalForm

_AIM = 1e-6  # relative width of an interval for epsilon: where refinement stops
_NARROW = 1e-4  # and that from which the answer counts
_AIM_DELTA, _NARROW_DELTA = 1e-6, 1e-3  # of an interval for delta
_ATTEMPTS = 9
_SETTLED = 0.1  # relative change of a guess that is not worth another line
_FIRST_DELTA, _LEAST_DELTA = 1e-6, 1e-290
_MOST_EXTENDED = 4  # components that are worth extended precision: it takes ten times as long
_MOST_CHECKED = 64  # components of a composition that the Renyi bound is tried for first


class ContourCertificate:
    """Bounds on epsilon for compositions of given components, up to given counts, at one delta.

    Args:
        form: the components, with the greatest counts that will be asked about.
        direction: which pair.
        delta: of every question.
        least: the smallest share of those counts that will be.
    """

    def __init__(self, form: NormalForm, direction: Direction, delta: float, least: float) -> None:
        self._form, self._direction, self._delta, self._least = form, direction, delta, least
        self._counts = [count for _, count in form.counts]
        self._steps = sampled_gaussians(form)
        self._tried: list[Attempt] = []
        self._more = self._attempts()

    def interval(self, counts: Sequence[int]) -> tuple[float, float] | None:
        """Bounds on epsilon for these counts; None if the contour gives no narrow ones."""
        for attempt in self._more:
            self._tried.append(attempt)
        if not self._tried:
            return None
        best = min(self._tried, key=lambda attempt: attempt.width)
        bounds = _interval(best.laws, counts, self._delta, best.ceiling)
        return bounds if _width(bounds) <= _NARROW else None

    def is_below(self, epsilon: float) -> bool:
        """Whether epsilon at the greatest counts is provably at most `epsilon`; no more work than it takes to say."""
        if self._proved_by_moments(epsilon):
            return True
        log_delta = math.log(self._delta)
        for attempt in itertools.chain(list(self._tried), self._remembered()):
            if attempt.laws.composed(self._counts, upper=True).log_delta(epsilon) <= log_delta:
                return True
            if attempt.laws.composed(self._counts, upper=False).log_delta(epsilon) > log_delta:
                return False
        return False

    def _remembered(self) -> Iterator[Attempt]:
        for attempt in self._more:
            self._tried.append(attempt)
            yield attempt

    def _proved_by_moments(self, epsilon: float) -> bool:
        terrain = self._terrain
        if terrain is None or len(self._form.counts) > _MOST_CHECKED:
            return False
        t = np.array([terrain.cumulants.best_tilt(epsilon)])
        moments = composed_log_moments(self._form, self._direction, t)
        return bool(log_delta_proved(moments, t, epsilon)[0] <= math.log(self._delta))

    @functools.cached_property
    def _terrain(self) -> Terrain | None:
        return None if self._steps is None else survey(self._steps, self._direction, self._delta)

    def _attempts(self) -> Iterator[Attempt]:
        """Laws that come closer and closer, ending with narrow ones or where nothing more is to be gained."""
        if self._steps is None or self._terrain is None:
            return
        guess = self._terrain.cumulants.expected(math.log(self._delta))
        settled: Line | None = None
        for _ in range(_ATTEMPTS):
            line = place_line(self._terrain, guess, self._delta, self._least)
            if line is None and settled is None:
                guess /= 2  # too many frequencies, perhaps because the guess is too high
                continue
            if line is None:
                break
            laws = ContourLaws.of(self._steps, self._direction, self._delta, line)
            if laws is None:
                return
            ceiling = 2 * guess + 1
            lower, upper = _interval(laws, self._counts, self._delta, ceiling)
            yield Attempt(_width((lower, upper)), laws, ceiling)
            if upper == 0 or upper - lower <= _AIM * upper:
                return
            closer = (lower + upper) / 2 if lower > 0 else min(upper, 2 * ceiling) / 2
            settled = line
            if abs(closer - guess) < _SETTLED * guess:  # the place is right, rounding is what is left
                break
            guess = closer
        if settled is not None and len(self._steps) <= _MOST_EXTENDED:
            laws = ContourLaws.of(self._steps, self._direction, self._delta, settled, "extended")
            if laws is not None:
                ceiling = 2 * guess + 1
                yield Attempt(_width(_interval(laws, self._counts, self._delta, ceiling)), laws, ceiling)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """Laws, the epsilon up to which they are to be asked, and the relative width of what they say."""

    width: float
    laws: ContourLaws
    ceiling: float


def _interval(laws: ContourLaws, counts: Sequence[int], delta: float, ceiling: float) -> tuple[float, float]:
    upper = laws.composed(counts, upper=True).epsilon(delta, ceiling)
    if upper >= ceiling:
        return 0.0, math.inf  # not found: no bound
    return laws.composed(counts, upper=False).epsilon(delta, upper), upper


def _width(bounds: tuple[float, float]) -> float:
    """Relative; 0 for (0, 0)."""
    lower, upper = bounds
    return (upper - lower) / upper if upper > 0 else 0.0


class ContourProfile:
    """Bounds on delta for one composition, at one epsilon after another: neighbours share their laws.

    Args:
        form: the composition.
        direction: which pair.
    """

    def __init__(self, form: NormalForm, direction: Direction) -> None:
        self._direction = direction
        self._counts = [count for _, count in form.counts]
        self._steps = sampled_gaussians(form)
        self._laws: ContourLaws | None = None

    def log_delta_interval(self, epsilon: float) -> tuple[float, float] | None:
        """Bounds on log delta at epsilon; None if the contour gives no narrow ones."""
        if self._steps is None:
            return None
        if self._laws is not None:
            bounds = self._bounds(self._laws, epsilon)
            if bounds[1] - bounds[0] <= _AIM_DELTA:
                return bounds
        delta = _FIRST_DELTA
        best: tuple[float, float] | None = None
        for _ in range(_ATTEMPTS):
            laws, cut_for = self._built(self._steps, epsilon, delta)
            if laws is None:
                break
            bounds = self._bounds(laws, epsilon)
            if best is None or bounds[1] - bounds[0] < best[1] - best[0]:
                best, self._laws = bounds, laws
            closer = math.exp(max(min(bounds[1], math.log(0.5)), math.log(_LEAST_DELTA)))
            if best[1] - best[0] <= _AIM_DELTA or abs(math.log(closer / delta)) < _SETTLED:
                break
            delta = closer
        if best is None or best[1] - best[0] <= _NARROW_DELTA or len(self._steps) > _MOST_EXTENDED:
            return best if best is not None and best[1] - best[0] <= _NARROW_DELTA else None
        assert self._laws is not None
        finer = ContourLaws.of(self._steps, self._direction, cut_for, self._laws.line, "extended")
        if finer is None:
            return None
        best, self._laws = self._bounds(finer, epsilon), finer
        return best if best[1] - best[0] <= _NARROW_DELTA else None

    def _built(self, steps: Steps, epsilon: float, delta: float) -> tuple[ContourLaws | None, float]:
        """Laws for the delta that is to be expected, starting from another."""
        terrain = survey(steps, self._direction, delta)
        if terrain is None:
            return None, delta
        expected = math.exp(max(terrain.cumulants.expected_log_delta(epsilon), math.log(_LEAST_DELTA)))
        if expected < delta / 10:  # its tails must be cut elsewhere
            terrain, delta = survey(steps, self._direction, expected), expected
            if terrain is None:
                return None, delta
        line = place_line(terrain, epsilon, expected, 1.0)
        if line is None:
            return None, delta
        return ContourLaws.of(steps, self._direction, min(delta, expected), line), delta

    def _bounds(self, laws: ContourLaws, epsilon: float) -> tuple[float, float]:
        upper = laws.composed(self._counts, upper=True).log_delta(epsilon)
        return laws.composed(self._counts, upper=False).log_delta(epsilon), upper
