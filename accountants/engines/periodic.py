"""A sum that repeats delta(eps) with a period, and the bounds that follow for delta itself.

Under a tilt t, a composition's hockey-stick divergence is computed as

    S(eps) = sum over integers m of e^(t m W) delta(eps + m W)

for some period W, divided by M(t)^T e^(-t eps), with M(t) = E e^(t L) of one step. The m = 0 term is wanted and the
others are positive, so S bounds delta from above as it is. From below, with delta <= 1 and Chernoff's bound at t + s,

    S(eps) - delta(eps) <= e^(-t W) / (1 - e^(-t W)) + M(t + s)^T e^(-(t + s) eps - s W) / (1 - e^(-s W)).

The tilt makes errors relative to delta, so doubles suffice at delta = 1e-15.

References:
    [1] Koskela, Jalko, Prediger, Honkela, Tight Differential Privacy for Discrete-Valued Mechanisms and for the
        Subsampled Gaussian Mechanism Using FFT, 2021. arXiv:2006.07134
    [2] Alghamdi et al., The Saddle-Point Method in Differential Privacy, 2023. arXiv:2208.09595
"""

from __future__ import annotations

import abc
import math

import numpy as np
from scipy import optimize

from accountants.components.component import Array

_EPSILON_ROUNDING = 1e-12  # relative, of a root
_SURE = 1e-12  # relative, of a mass that counts from below


def chernoff_widths(t: Array, log_mass: Array, epsilon: float, allowed: float) -> tuple[Array, Array]:
    """For each tilt, the narrowest period whose other terms stay e^-allowed below 1, and the s that shows it.

    Args:
        t: tilts to choose from, increasing, shape [M].
        log_mass: log M(t)^T of each.
        epsilon: where an answer is wanted.
        allowed: minus the log of what the other terms may add up to.

    Returns:
        (width, extra), shape [M]; inf for the greatest tilt, which no other bounds.
    """
    # Chernoff at t_j for the terms to the right of tilt t_i: (K_j - t_j eps + allowed) / (t_j - t_i) for each j > i.
    gaps = t[None, :] - t[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        right = np.where(gaps > 0, (log_mass - t * epsilon + allowed) / gaps, np.inf)
    at = right.argmin(axis=1)
    rows = np.arange(len(t))
    return np.maximum(allowed / t, right[rows, at]), gaps[rows, at]


class PeriodicSum(abc.ABC):
    """S for one composition; bounds on delta(eps), and on the eps at a delta.

    Args:
        tilt: t > 0.
        extra: s > 0, for the bound on the terms that are not wanted.
        width: W, in units of loss.
        log_mass: log M(t)^T.
        log_mass_extra: log M(t + s)^T.
        infinite: probability that the loss is infinite; from above, also that it was cut off.
        error: bound on the error of `_normalised`, in the same unit.
        rounding: absolute, of a loss.
        scale: relative error of M(t)^T, not in `error`.
        upper: whether to bound from above or from below.
    """

    def __init__(
        self,
        *,
        tilt: float,
        extra: float,
        width: float,
        log_mass: float,
        log_mass_extra: float,
        infinite: float,
        error: float,
        rounding: float,
        scale: float = 0.0,
        upper: bool,
    ) -> None:
        self._tilt, self._extra, self._width = tilt, extra, width
        self._log_mass, self._log_mass_extra = log_mass, log_mass_extra
        self._infinite, self._error, self._rounding, self._upper = infinite, error, rounding, upper
        self._log_scale_error = math.log1p(scale)

    @abc.abstractmethod
    def _normalised(self, epsilon: float) -> float:
        """S(epsilon) e^(t epsilon) / M(t)^T."""

    def log_delta(self, epsilon: float) -> float:
        """log of the bound on delta at epsilon: upper or lower as the laws are; -inf where the lower bound is 0."""
        tilted = self._normalised(epsilon)
        log_scale = self._log_mass - self._tilt * epsilon
        if self._upper:
            log_scale += self._log_scale_error
            value = log_scale + math.log(max(tilted, 0.0) + self._error)
            return value if self._infinite == 0 else float(np.logaddexp(value, math.log(self._infinite)))
        certain = math.log(self._infinite) - _SURE if self._infinite > 0 else -math.inf
        if tilted <= self._error:
            return certain
        value = log_scale - self._log_scale_error + math.log(tilted - self._error)
        lost = self._wrapped(epsilon) - value
        return float(np.logaddexp(value + math.log(-math.expm1(lost)), certain)) if lost < 0 else certain

    def _wrapped(self, epsilon: float) -> float:
        """log of the bound on S(epsilon) - delta(epsilon)."""
        tilt, extra, width = self._tilt, self._extra, self._width
        left = -tilt * width - math.log(-math.expm1(-tilt * width))
        right = self._log_mass_extra - (tilt + extra) * epsilon - extra * width
        right -= math.log(-math.expm1(-extra * width))
        return float(np.logaddexp(left, right))

    def epsilon(self, delta: float, ceiling: float) -> float:
        """The epsilon at which the bound is delta, rounded to the safe side; within [0, ceiling].

        An upper law gives the least epsilon that it proves (ceiling if it proves none below); a lower law, an epsilon
        that the truth is not below (0 if it finds none: far below the window's place its bound is void).
        """
        target = math.log(delta)

        def excess(epsilon: float) -> float:
            return max(self.log_delta(epsilon) - target, -1e6)

        if excess(ceiling) > 0:
            return ceiling
        floor = 0.0
        if not self._upper:
            step = ceiling * 1e-6
            floor = ceiling
            while floor > 0 and excess(floor) <= 0:
                floor, step = max(floor - step, 0.0), step * 3
        if excess(floor) <= 0:
            return 0.0
        root = float(optimize.brentq(excess, floor, ceiling, xtol=1e-300, rtol=1e-11, maxiter=1000))
        margin = _EPSILON_ROUNDING * (root + self._rounding)
        if self._upper:
            while root < ceiling and excess(root) > 0:
                root, margin = root + margin, margin * 4
            return min(root, ceiling)
        while root > 0 and excess(root) < 0:
            root, margin = root - margin, margin * 4
        return max(root, 0.0)
