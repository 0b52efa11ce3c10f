"""The hockey-stick divergence of many steps at once, from one Fourier transform of each kind of step.

A lattice law p with losses v is tilted, p_t(v) = p(v) e^(t v) / M(t), and transformed on N points, a window of width
W = N h. With F its transform and T steps, the window's periodic sum

    S(eps) = sum over integers m of e^(t m W) delta(eps + m W)

is M(t)^T e^(-t eps) / N times a sum over frequencies of F^T against the closed-form transform of (1 - e^(eps - v))+
under the tilt. Its m = 0 term is wanted and the others are positive, so S bounds delta from above as it is. From
below, with delta <= 1 and Chernoff's bound at t + s,

    S(eps) - delta(eps) <= e^(-t W) / (1 - e^(-t W)) + M(t + s)^T e^(-(t + s) eps - s W) / (1 - e^(-s W)).

The tilt makes the error relative to delta, so doubles suffice at delta = 1e-15. Rounding is covered by a model, not
by interval arithmetic: each F is taken to be wrong by `_rounding` (a transform's worst case, and the masses' error
seen through their moment), and its effect on S is summed in absolute value.

References:
    [1] Koskela, Jalko, Prediger, Honkela, Tight Differential Privacy for Discrete-Valued Mechanisms and for the
        Subsampled Gaussian Mechanism Using FFT, 2021. arXiv:2006.07134
    [2] Alghamdi et al., The Saddle-Point Method in Differential Privacy, 2023. arXiv:2208.09595
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import fft, optimize

from accountants.components.component import Array
from accountants.lattice import LatticeLaw

Complex = NDArray[np.complex128]

_UNIT = 2.0**-53
_NEGLIGIBLE = -45.0  # log of a frequency's weight that is bounded, not summed
_EPSILON_ROUNDING = 1e-12  # relative, of a root


@dataclasses.dataclass(frozen=True)
class Window:
    """Where and how finely a composition is computed.

    Attributes:
        tilt: t > 0.
        extra: s > 0, for the bound on what the window wraps around.
        width: W, in units of loss.
        size: N, a power of two.
    """

    tilt: float
    extra: float
    width: float
    size: int

    @property
    def spacing(self) -> float:
        """Of the lattice."""
        return self.width / self.size


@dataclasses.dataclass(frozen=True)
class StepSpectrum:
    """One tilted law in Fourier space.

    Attributes:
        log_mass: log M(t).
        log_mass_extra: log M(t + s).
        log_transform: log F, shape [N / 2 + 1], complex.
        origin: loss at lattice index 0.
        log_finite: log(1 - mass at infinity).
        rounding: bound on the error of each F, shape [N / 2 + 1].
    """

    log_mass: float
    log_mass_extra: float
    log_transform: Complex
    origin: float
    log_finite: float
    rounding: Array

    @staticmethod
    def of(law: LatticeLaw, window: Window) -> StepSpectrum:
        """Tilt and transform `law`."""
        losses = law.losses
        with np.errstate(divide="ignore"):
            log_mass = np.log(law.mass)
        tilted, log_total = _normalised(log_mass + window.tilt * losses)
        _, log_total_extra = _normalised(log_mass + (window.tilt + window.extra) * losses)
        transform = fft.rfft(np.bincount(law.index % window.size, weights=tilted, minlength=window.size))
        with np.errstate(divide="ignore"):
            log_transform = np.log(transform)
        log_transform.real = np.maximum(log_transform.real, -700.0)
        frequencies: Array = 2 * math.pi / window.width * np.arange(len(transform), dtype=np.float64)
        spread = 1 + min(float(losses.max() - losses.min()), 2 * window.width)
        rounding = _UNIT * (4 * math.log2(window.size) + 16 * (1 + (window.tilt + frequencies) * spread))
        return StepSpectrum(
            log_total, log_total_extra, log_transform, law.origin, math.log1p(-min(law.infinite, 0.5)), rounding
        )


def combined(spectra: Iterable[StepSpectrum], counts: Sequence[int]) -> StepSpectrum:
    """The composition of many spectra as one, without keeping them."""
    total: StepSpectrum | None = None
    for spectrum, count in zip(spectra, counts, strict=True):
        # Rounding relative to F here; made absolute again at the end.
        with np.errstate(divide="ignore"):
            relative = np.log(count * spectrum.rounding) - spectrum.log_transform.real
        repeated = StepSpectrum(
            count * spectrum.log_mass,
            count * spectrum.log_mass_extra,
            count * spectrum.log_transform,
            count * spectrum.origin,
            count * spectrum.log_finite,
            relative,
        )
        if total is None:
            total = repeated
        else:
            total = StepSpectrum(
                total.log_mass + repeated.log_mass,
                total.log_mass_extra + repeated.log_mass_extra,
                total.log_transform + repeated.log_transform,
                total.origin + repeated.origin,
                total.log_finite + repeated.log_finite,
                np.logaddexp(total.rounding, relative),
            )
    assert total is not None
    rounding = np.exp(np.maximum(total.rounding + total.log_transform.real, -700.0))
    return dataclasses.replace(total, rounding=rounding)


def _normalised(log_weights: Array) -> tuple[Array, float]:
    """Weights with sum 1, and the log of the sum they had."""
    top = float(log_weights.max())
    weights = np.exp(log_weights - top)
    total = float(weights.sum())
    weights /= total
    return weights, top + math.log(total)


@functools.lru_cache(maxsize=6)
def _hockey_stick(window: Window) -> tuple[Complex, Complex, Array]:
    """Transform of (1 - e^(eps - v))+ under the tilt, over N: its two parts, and a bound on their sum's size.

    At distance d from eps to the next lattice point, the weight of a frequency is
    e^(-t d) near - e^(-(t + 1) d) far, and its size at most |near - far| + h (t |near| + (t + 1) |far|) for d < h.
    """
    turns = 2 * math.pi / window.size * np.arange(window.size // 2 + 1)
    multiplicity = np.full(len(turns), 2.0 / window.size)
    multiplicity[[0, -1]] /= 2
    tilt, spacing = window.tilt, window.spacing
    near = multiplicity / -np.expm1(-tilt * spacing + 1j * turns)
    far = multiplicity / -np.expm1(-(tilt + 1) * spacing + 1j * turns)
    size = np.abs(near - far) + spacing * (tilt * np.abs(near) + (tilt + 1) * np.abs(far))
    return near, far, size


class ComposedLaw:
    """The periodic sum S for one choice of counts; bounds on delta(eps), and on the eps at a delta.

    Args:
        spectra: of each component, all on `window`.
        counts: steps of each, > 0.
        window: shared.
        upper: whether the laws dominate (upper bounds) or are dominated (lower bounds).
    """

    def __init__(self, spectra: Sequence[StepSpectrum], counts: Sequence[int], window: Window, *, upper: bool) -> None:
        self._window, self._upper = window, upper
        half = window.size // 2
        total = np.zeros(half + 1, dtype=np.complex128)
        self._log_mass = self._log_mass_extra = self._base = log_finite = 0.0
        for spectrum, count in zip(spectra, counts, strict=True):
            total += count * spectrum.log_transform
            self._log_mass += count * spectrum.log_mass
            self._log_mass_extra += count * spectrum.log_mass_extra
            self._base += count * spectrum.origin
            log_finite += count * spectrum.log_finite
        self._infinite = -math.expm1(log_finite)

        # d(prod F^T) <= sum_c T_c |dF_c| |prod F^T| / |F_c|, frequency by frequency, against each weight's size.
        sensitivity = np.zeros(half + 1)
        for spectrum, count in zip(spectra, counts, strict=True):
            sensitivity += count * spectrum.rounding * np.exp(total.real - spectrum.log_transform.real)
        near, far, size = _hockey_stick(window)
        kept = np.flatnonzero(total.real > _NEGLIGIBLE)
        dropped = math.exp(_NEGLIGIBLE) * (half + 1 - len(kept)) * float(size.max())
        self._error = float(np.dot(size, sensitivity)) + dropped
        powers = np.exp(total[kept])
        self._kept, self._near, self._far = kept, powers * near[kept], powers * far[kept]

    def log_delta(self, epsilon: float) -> float:
        """log of the bound on delta at epsilon: upper or lower as the laws are; -inf where the lower bound is 0."""
        tilted = self._periodic(epsilon)
        log_scale = self._log_mass - self._window.tilt * epsilon
        if self._upper:
            value = log_scale + math.log(max(tilted, 0.0) + self._error)
            return value if self._infinite == 0 else float(np.logaddexp(value, math.log(self._infinite)))
        if tilted <= self._error:
            return -math.inf
        value = log_scale + math.log(tilted - self._error)
        lost = self._wrapped(epsilon) - value
        return value + math.log(-math.expm1(lost)) if lost < 0 else -math.inf

    def _periodic(self, epsilon: float) -> float:
        """S(epsilon) e^(t epsilon) / M(t)^T."""
        window = self._window
        position = math.ceil((epsilon - self._base) / window.spacing)
        beyond = self._base + position * window.spacing - epsilon  # from epsilon to the next lattice point
        phase = np.exp(2j * math.pi / window.size * ((self._kept * (position % window.size)) % window.size))
        near = math.exp(-window.tilt * beyond) * self._near
        near -= math.exp(-(window.tilt + 1) * beyond) * self._far
        return float(np.dot(phase, near).real)

    def _wrapped(self, epsilon: float) -> float:
        """log of the bound on S(epsilon) - delta(epsilon)."""
        tilt, extra, width = self._window.tilt, self._window.extra, self._window.width
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
        root = float(optimize.brentq(excess, floor, ceiling, xtol=1e-300, rtol=1e-11))
        margin = _EPSILON_ROUNDING * (root + abs(self._base) * 1e-3)
        if self._upper:
            while root < ceiling and excess(root) > 0:
                root, margin = root + margin, margin * 4
            return min(root, ceiling)
        while root > 0 and excess(root) < 0:
            root, margin = root - margin, margin * 4
        return max(root, 0.0)
