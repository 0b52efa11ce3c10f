"""The hockey-stick divergence of many steps at once, from one Fourier transform of each kind of lattice law.

A lattice law p with losses v is tilted, p_t(v) = p(v) e^(t v) / M(t), and transformed on N points, a window of width
W = N h. With F its transform and T steps, the periodic sum (`periodic`) of period W is M(t)^T e^(-t eps) / N times a
sum over frequencies of F^T against the closed-form transform of (1 - e^(eps - v))+ under the tilt.

Rounding is covered by a model, not by interval arithmetic: each F is taken to be wrong by `rounding` (a transform's
worst case, and the masses' error seen through their moment), and its effect is summed in absolute value.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from accountants.components.component import Array
from accountants.engines.lattice import LatticeLaw
from accountants.engines.periodic import PeriodicSum

Complex = NDArray[np.complex128]

_UNIT = 2.0**-53
_NEGLIGIBLE = -45.0  # log of a frequency's weight that is bounded, not summed


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
        log_finite = math.log1p(-law.infinite) if law.infinite < 1 else -math.inf
        return StepSpectrum(log_total, log_total_extra, log_transform, law.origin, log_finite, rounding)


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


class ComposedLaw(PeriodicSum):
    """The periodic sum for one choice of counts.

    Args:
        spectra: of each component, all on `window`.
        counts: steps of each, > 0.
        window: shared.
        upper: whether the laws dominate (upper bounds) or are dominated (lower bounds).
    """

    def __init__(self, spectra: Sequence[StepSpectrum], counts: Sequence[int], window: Window, *, upper: bool) -> None:
        half = window.size // 2
        total = np.zeros(half + 1, dtype=np.complex128)
        log_mass = log_mass_extra = self._base = log_finite = 0.0
        for spectrum, count in zip(spectra, counts, strict=True):
            total += count * spectrum.log_transform
            log_mass += count * spectrum.log_mass
            log_mass_extra += count * spectrum.log_mass_extra
            self._base += count * spectrum.origin
            log_finite += count * spectrum.log_finite

        # d(prod F^T) <= sum_c T_c |dF_c| |prod F^T| / |F_c|, frequency by frequency, against each weight's size.
        sensitivity = np.zeros(half + 1)
        for spectrum, count in zip(spectra, counts, strict=True):
            sensitivity += count * spectrum.rounding * np.exp(total.real - spectrum.log_transform.real)
        near, far, size = _hockey_stick(window)
        kept = np.flatnonzero(total.real > _NEGLIGIBLE)
        dropped = math.exp(_NEGLIGIBLE) * (half + 1 - len(kept)) * float(size.max())
        powers = np.exp(total[kept])
        self._kept, self._near, self._far = kept, powers * near[kept], powers * far[kept]
        self._window = window
        super().__init__(
            tilt=window.tilt,
            extra=window.extra,
            width=window.width,
            log_mass=log_mass,
            log_mass_extra=log_mass_extra,
            infinite=-math.expm1(log_finite),
            error=float(np.dot(size, sensitivity)) + dropped,
            rounding=abs(self._base) * 1e-3,
            upper=upper,
        )

    def _normalised(self, epsilon: float) -> float:
        """By the transform of (1 - e^(eps - v))+ on the lattice, in closed form."""
        window = self._window
        position = math.ceil((epsilon - self._base) / window.spacing)
        beyond = self._base + position * window.spacing - epsilon  # from epsilon to the next lattice point
        phase = np.exp(2j * math.pi / window.size * ((self._kept * (position % window.size)) % window.size))
        near = math.exp(-window.tilt * beyond) * self._near
        near -= math.exp(-(window.tilt + 1) * beyond) * self._far
        return float(np.dot(phase, near).real)
