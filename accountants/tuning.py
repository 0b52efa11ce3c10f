"""Trying many configurations and publishing the best: what the choice costs, when how many are tried is random.

Publishing the best of a fixed number of runs can cost as much as publishing all of them. It costs little more than one
run if the number of runs K is drawn at random, and drawn alike whatever the data are [1]: then that a result was the
best tells little about the data. Each run must choose its own hyperparameters at random, alike every time and from
a public list, so that a run is one fixed mechanism; the score that decides must be computed inside it.

K follows one of the laws below; `mean` is E[K], `shape` (eta) says how spread out it is. With gamma in (0, 1) and
log(1/gamma) found from the mean,

    shape in (-1, inf)   truncated negative binomial:  P(K = k) ~ (1 - gamma)^k Gamma(k + eta) / k!,  k >= 1
                         1: geometric; 0: logarithmic; towards -1 K is mostly 1 and rarely very large
    shape inf            Poisson, K >= 0: the most concentrated; nothing is published when K is 0

A lower shape costs less privacy at the same mean, but more of its draws are 1. K, the other runs and how long the
search took stay secret.

If one run has Renyi divergence R(a) at every order a, publishing the best of K has, at order a,

    shape eta    R(a) + log E[K] / (a - 1) + (1 + eta) min over b >= 1 of (1 - 1/b) R(b) + log(1/gamma) / b
                                                                                                   [1, Theorem 2]
    Poisson      log(e^-m + m e^((a - 1) (R(a) + m d))) / (a - 1)        m = E[K]

where each run is (log(1 + 1/(a - 1)), d)-differentially private. The Poisson line is [1, Theorem 6], which reads
R(a) + m d + log(m) / (a - 1), with one term more, e^-m, for the outcome that nothing is published. In full: let
f(x) = e^(m (x - 1)), the mean of x^K. A result y is published with probability Q(y) E f'(q), q uniform between the
chances that one run is below y and up to y. By convexity, the moment of the likelihood ratio over all y is at most
e^((a - 1) R(a)) times the largest f'(q)^a f'(q')^(1 - a), and that is

    m exp(m (a - 1) [(1 - q') - (1 + 1/(a - 1)) (1 - q)])

whose bracket is at most d. The outcome K = 0, as likely with either data set, adds f(0) = e^-m.

Example:
    >>> from accountants.events import Gaussian, PoissonSampled
    >>> from accountants.rdp_accountant import rdp
    >>> training = 1000 * PoissonSampled(0.01, Gaussian(1.0))
    >>> search = Repetitions(mean=20, shape=0.0)
    >>> search.rdp(lambda orders: rdp(training, orders), [4.0, 8.0]).round(3)
    array([2.421, 2.56 ])

References:
    [1] Papernot, Steinke, Hyperparameter Tuning with Renyi Differential Privacy, 2022. arXiv:2110.03620
"""

from __future__ import annotations

import dataclasses
import functools
import math
import secrets
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from accountants import arguments
from accountants.best_moment import Array, best_moment
from accountants.errors import ParameterError

RenyiCurve = Callable[[Array], Array]  # orders > 1, shape [M], to upper bounds on the divergence, shape [M]

_ROUNDING = 1e-12  # relative
_LARGEST = 1e6  # mean, as one of its draws is summed up to; shape, as beyond it is as good as Poisson
_DELTA_MOMENTS = 96  # orders that d is looked for at: any are sound, more are tighter
_LEAST_TAIL = 2.0**-60  # chance of a draw beyond the last that is told apart


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repetitions:
    """The law of how many configurations are tried.

    Args:
        mean: E[K], >= 1 (Poisson: > 0), at most a million; a public number.
        shape: eta > -1, at most a million or math.inf; 0 logarithmic, 1 geometric, math.inf Poisson.

    Guarantee:
        `rdp` bounds the best of them all; the law has to be drawn from in secret, once (`draw`).

    Raises:
        ParameterError: mean or shape out of range.

    Example:
        >>> round(Repetitions(mean=10, shape=1.0).gamma, 9)
        0.1

    References:
        Papernot, Steinke, Hyperparameter Tuning with Renyi Differential Privacy, 2022. arXiv:2110.03620
    """

    mean: float
    shape: float

    def __post_init__(self) -> None:
        remedy = "Give 1.0 (geometric), 0.0 (logarithmic) or math.inf (Poisson)."
        shape = arguments.real("shape", self.shape, remedy=remedy)
        if not shape > -1:
            raise ParameterError(f"shape must be > -1, got {shape!r}. {remedy}")
        if _LARGEST < shape < math.inf:
            raise ParameterError(f"shape must be at most {_LARGEST:g}, or math.inf, got {shape!r}. Use math.inf.")
        remedy = "Give the expected number of runs, for example 20."
        mean = arguments.real("mean", self.mean, remedy=remedy)
        least = "> 0" if shape == math.inf else ">= 1, as at least one run is made,"
        if not (0 < mean < math.inf) or (mean < 1 and shape < math.inf):
            raise ParameterError(f"mean must be {least} and finite, got {mean!r}. {remedy}")
        if mean > _LARGEST:
            raise ParameterError(f"mean must be at most {_LARGEST:g}, got {mean!r}. {remedy}")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "mean", mean)

    @property
    def gamma(self) -> float | None:
        """The parameter that gives the negative binomial its mean; 1 where K is always 1, None for Poisson."""
        return None if self.shape == math.inf else math.exp(-self._log_inverse_gamma)

    @functools.cached_property
    def _log_inverse_gamma(self) -> float:
        """log(1/gamma), found from log E[K] = log h(log(1/gamma)) - log h(-eta log(1/gamma)), h(x) = (e^x - 1) / x."""
        target = math.log(self.mean)
        if target == 0:
            return 0.0

        def excess(log_inverse: float) -> float:
            return _log_mean(log_inverse, self.shape) - target

        high = 1.0
        while excess(high) < 0:
            high *= 2
        return float(optimize.brentq(excess, 0.0, high, xtol=1e-300, rtol=1e-15))

    def log_probability(self, count: ArrayLike) -> Array:
        """log P(K = count), shape as count; -inf below the least count."""
        k = arguments.reals("count", count, remedy="Give numbers of runs, for example [1, 2, 3].")
        if self.shape == math.inf:
            log_p = k * math.log(self.mean) - self.mean - special.gammaln(np.maximum(k, 0) + 1)
            return np.where(k >= 0, log_p, -np.inf)
        if self._log_inverse_gamma == 0:
            return np.where(k == 1, 0.0, -np.inf)
        log_inverse, eta = self._log_inverse_gamma, self.shape
        kept = np.maximum(k, 1)
        # eta / (gamma^-eta - 1) = 1 / (log(1/gamma) h(eta log(1/gamma))), which is smooth at eta = 0.
        log_norm = math.log(log_inverse) + _log_h(eta * log_inverse) + math.lgamma(1 + eta)
        log_p = kept * math.log(-math.expm1(-log_inverse)) + special.gammaln(kept + eta) - special.gammaln(kept + 1)
        return np.where(k >= 1, log_p - log_norm, -np.inf)

    def draw(self, *, insecure_rng: np.random.Generator | None = None) -> int:
        """One K; to be kept secret, and drawn before anything else.

        Args:
            insecure_rng: for tests: repeatable, and so known to whoever knows the seed. By default the operating
                system's generator.
        """
        u = secrets.randbits(53) * 2.0**-53 if insecure_rng is None else float(insecure_rng.random())
        start, size, below = (0 if self.shape == math.inf else 1), 64, 0.0
        while True:
            mass = np.exp(self.log_probability(np.arange(start, start + size)))
            reached = below + np.cumsum(mass)
            if reached[-1] > u:
                return start + int(np.searchsorted(reached, u, side="right"))
            start, size, below = start + size, min(2 * size, 2**16), float(reached[-1])
            if start > self.mean and mass.sum() < _LEAST_TAIL:
                return start

    def rdp(self, curve: RenyiCurve, orders: ArrayLike) -> Array:
        """Renyi divergence of publishing the best of K runs, at each order.

        Args:
            curve: Renyi divergence of one run: from orders, shape [M], to upper bounds, shape [M], the larger of both
                directions; inf where none is known.
            orders: Renyi orders > 1, any shape.

        Returns:
            Upper bounds, same shape as orders.

        Guarantee:
            See the module. If every run is a call of the same mechanism with fresh randomness, and only the best
            by a total order of the outputs is published.

        Raises:
            ParameterError: an order that is not above 1 and finite.
        """
        alpha = arguments.orders(orders)
        t = alpha.ravel() - 1
        bound = self._poisson(curve, t) if self.shape == math.inf else self._negative_binomial(curve, t)
        return (bound * (1 + _ROUNDING)).reshape(alpha.shape)

    def _negative_binomial(self, curve: RenyiCurve, t: Array) -> Array:
        log_inverse = self._log_inverse_gamma * (1 + _ROUNDING)
        log_mean = math.log(self.mean) * (1 + _ROUNDING)
        _, least = best_moment(lambda b: (b * curve(1 + b) + log_inverse) / (1 + b))
        extra = (1 + self.shape) * min(least, log_inverse)  # order b = 1 needs no divergence
        # Divergences grow with the order: below the order at which the bound is least, that least value holds.
        lowest, value = best_moment(lambda s: curve(1 + s) + log_mean / s)
        own = curve(1 + t) + log_mean / t
        return np.where(t < lowest, np.minimum(own, value), own) + extra

    def _poisson(self, curve: RenyiCurve, t: Array) -> Array:
        # For Gaussian noise the orders worth having and those that prove d for them are of one size.
        m, s = self.mean, np.geomspace(0.05, max(64.0, 16 * float(t.max(initial=0.0))), _DELTA_MOMENTS)
        allowed = np.log1p(1 / t)  # the epsilon at which d is wanted
        log_delta = s * curve(1 + s) - s * np.log1p(1 / s) - np.log1p(s)
        with np.errstate(invalid="ignore"):
            delta = np.exp(np.minimum(np.min(log_delta - np.multiply.outer(allowed, s), axis=1), 0.0))
        bound: Array = np.logaddexp(-m, math.log(m) + t * (curve(1 + t) + m * delta)) / t
        return bound


def _log_mean(log_inverse: float, eta: float) -> float:
    return _log_h(log_inverse) - _log_h(-eta * log_inverse)


def _log_h(x: float) -> float:
    """log((e^x - 1) / x), without overflow."""
    if abs(x) < 1:
        return math.log(float(special.exprel(x)))
    return (x if x > 0 else 0.0) + math.log(-math.expm1(-abs(x))) - math.log(abs(x))
