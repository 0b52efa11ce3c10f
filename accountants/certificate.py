"""Certified bounds for one composition in one direction: choose the window, build the laws, refine until tight.

The window's tilt, width and resolution affect tightness only; whatever they are, the bounds are sound.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from accountants.composition import ComposedLaw, StepSpectrum, Window
from accountants.lattice import dominated, dominating
from accountants.normal_form import Component, NormalForm
from accountants.pairs import LossPair
from accountants.rdp_accountant import best_moment, composed_log_moments, epsilon_score, log_delta_score
from accountants.renyi import Direction

RELATIVE_WIDTH = 1e-4  # of the interval for epsilon: where refinement stops
_COARSEST, _FINEST = 2**12, 2**19  # lattice points in the window
_TAIL_SHARE = 1e-7  # of delta, spent on each step's truncated tails, all steps together
_WRAP_SHARE = 1e-8  # of delta, allowed to wrap around the window
_ROUNDING_SHARE = 1e-7  # of delta, aimed at for rounding: T steps at 1e-14 each, scaled by the tilt


@dataclasses.dataclass(frozen=True)
class Laws:
    """Both bounds at one resolution."""

    window: Window
    upper: tuple[StepSpectrum, ...]
    lower: tuple[StepSpectrum, ...]


class Certificate:
    """Bounds for compositions of given components, up to given counts, near a given delta, in one direction.

    Args:
        form: the components, with the greatest counts that will be asked about.
        direction: which pair.
        delta: that the window is made for.
    """

    def __init__(self, form: NormalForm, direction: Direction, delta: float) -> None:
        self._form, self._direction, self._delta = form, direction, delta
        self._pairs = [LossPair(component, direction) for component, _ in form.counts]
        self._counts = [count for _, count in form.counts]
        _, self._ceiling = best_moment(epsilon_score(form, [direction], delta))
        self._laws: list[Laws] = []
        if 0 < self._ceiling < math.inf:
            self._refine()

    def _refine(self) -> None:
        """Coarse laws first, to place the window; then finer ones until the interval is narrow."""
        guess = self._ceiling
        for _ in range(6):
            coarse = self._build(self._window(guess, _COARSEST))
            lower, upper = self._interval(coarse)
            if upper > 0.8 * guess:
                break
            guess = max(upper, guess / 50)
        self._laws.append(coarse)
        size = _COARSEST
        while upper > 0 and upper - lower > RELATIVE_WIDTH * upper and size < _FINEST:
            # Second order: the width falls as 1 / size^2.
            wanted = size * math.sqrt(1.5 * (upper - lower) / (RELATIVE_WIDTH * upper))
            size = min(max(2 * size, 2 ** math.ceil(math.log2(min(wanted, _FINEST)))), 16 * size, _FINEST)
            fine = self._build(self._window(upper, size))
            lower, upper = self._interval(fine)
            self._laws[1:] = [fine]

    def _interval(self, laws: Laws) -> tuple[float, float]:
        ends = [
            ComposedLaw(spectra, self._counts, laws.window, upper=side).epsilon(self._delta, self._ceiling)
            for spectra, side in ((laws.lower, False), (laws.upper, True))
        ]
        return ends[0], ends[1]

    def _build(self, window: Window) -> Laws:
        tail = max(self._delta * _TAIL_SHARE / sum(self._counts), 1e-300)
        upper = [dominating(pair, window.spacing, window.width, tail) for pair in self._pairs]
        lower = [dominated(pair, window.spacing, window.width, tail) for pair in self._pairs]
        return Laws(
            window,
            tuple(StepSpectrum.of(law, window) for law in upper),
            tuple(StepSpectrum.of(law, window) for law in lower),
        )

    def _window(self, epsilon: float, size: int) -> Window:
        """The narrowest window that wraps and rounds little, if the answer is about `epsilon`."""
        form, direction = self._form, self._direction
        saddle, _ = best_moment(log_delta_score(form, [direction], epsilon))
        t = saddle * np.exp(np.linspace(math.log(1 / 30), math.log(8), 49))
        log_mass = composed_log_moments(form, direction, t)
        allowed = -math.log(self._delta) - math.log(_WRAP_SHARE)
        left = allowed / t
        # Chernoff at t_j for the wrap of tilt t_i: (K_j - t_j eps + allowed) / (t_j - t_i) for each j > i.
        gaps = t[None, :] - t[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            right = np.where(gaps > 0, (log_mass - t * epsilon + allowed) / gaps, np.inf)
        width = np.maximum(left, right.min(axis=1))
        noise = log_mass - t * epsilon - math.log(self._delta)
        budget = max(math.log(_ROUNDING_SHARE / 1e-14 / sum(self._counts)), float(noise.min()) + 1)
        best = int(np.argmin(np.where(noise <= budget, width, np.inf)))
        extra = float(gaps[best, int(np.argmin(right[best]))])
        return Window(tilt=float(t[best]), extra=extra, width=self._fitted(float(width[best]), size), size=size)

    def _fitted(self, width: float, size: int) -> float:
        """A width not below `width` whose lattice divides the support of the commonest law with atoms, if any."""
        atoms = [(count, pair.support) for pair, count in zip(self._pairs, self._counts) if pair.has_atoms]
        if not atoms or not math.isfinite(width):
            return width
        _, (least, most) = max(atoms)
        cells = (most - least) * size / width
        return (most - least) * size / math.floor(cells) if cells >= 1 else width

    def upper(self, counts: list[int], delta: float, ceiling: float, *, coarse: bool = False) -> float:
        """Upper bound on epsilon, at most `ceiling` (which must itself be an upper bound)."""
        if not self._laws:
            return min(ceiling, max(self._ceiling, 0.0)) if counts == self._counts else ceiling
        laws = self._laws[0 if coarse else -1]
        return ComposedLaw(laws.upper, counts, laws.window, upper=True).epsilon(delta, ceiling)
