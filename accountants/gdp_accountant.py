"""Gaussian differential privacy: exact for un-sampled Gaussians, an estimate for sampled ones.

    un-sampled    mu^2 = sum of 1 / sigma^2                                                      [1, Corollary 3.3]
    sampled       mu^2 = sum of q^2 (e^(1 / sigma^2) - 1), in the limit of many steps at rates q near 0       [2]

The limit is no bound: at a finite number of steps the truth lies on either side of it, and where single steps matter
far above (3.06 for a true 5.23 at rate 1e-3, noise multiplier 0.5, 10,000 steps, delta 1e-5). So `epsilon` and
`delta` return a plain upper bound where every step is an un-sampled Gaussian, and an `Estimate` as soon as one is
sampled; `interval` and `delta_interval`, which promise, then refuse.

Example:
    >>> from accountants.events import Gaussian, PoissonSampled
    >>> round(GDPAccountant().compose(PoissonSampled(1e-3, Gaussian(0.5)), count=10_000).epsilon(1e-5), 2)
    Estimate(3.06)

References:
    [1] Dong, Roth, Su, Gaussian Differential Privacy, 2019. arXiv:1905.02383
    [2] Bu, Dong, Long, Su, Deep Learning with Gaussian Differential Privacy, 2020. arXiv:1911.11607
"""

from __future__ import annotations

import math

from accountants import arguments
from accountants.accountant import Accountant
from accountants.components.sampled_noise import SampledNoise
from accountants.engines import gaussian
from accountants.errors import UnsupportedEventError
from accountants.estimate import Estimate
from accountants.interval import Interval
from accountants.reduction.normal_form import NormalForm


class GDPAccountant(Accountant):
    """Gaussians, sampled or not; refuses everything else. See the module for what is exact and what is not.

    Example:
        >>> from accountants.events import Gaussian
        >>> round(GDPAccountant().compose(Gaussian(5.0), count=25).epsilon(1e-5), 6)
        4.377178

    References:
        Dong, Roth, Su, Gaussian Differential Privacy, 2019. arXiv:1905.02383; Bu, Dong, Long, Su, Deep Learning with
        Gaussian Differential Privacy, 2020. arXiv:1911.11607 (the limit under sampling).
    """

    @property
    def mu(self) -> float:
        """The Gaussian parameter of everything composed so far: exact, or an Estimate; inf without noise.

        Raises:
            UnsupportedEventError: this accountant has no limit for what was composed.
        """
        exact = self._normal_form().gaussian_mu
        return Estimate(_limit(self._normal_form())) if exact is None else exact

    def epsilon(self, delta: float) -> float:
        """An upper bound on epsilon at `delta`, exact; or an Estimate where a step was sampled.

        Raises:
            ParameterError: delta is not in (0, 1).
        """
        mu = self.mu
        if not isinstance(mu, Estimate):
            return super().epsilon(delta)
        delta = arguments.delta(delta)
        return Estimate(gaussian.epsilon_bounds(float(mu), delta)[1] if float(mu) < _LARGEST_MU else math.inf)

    def delta(self, epsilon: float) -> float:
        """An upper bound on delta at `epsilon`, exact; or an Estimate where a step was sampled.

        Raises:
            ParameterError: epsilon is negative, infinite or NaN.
        """
        mu = self.mu
        if not isinstance(mu, Estimate):
            return super().delta(epsilon)
        epsilon = arguments.epsilon(epsilon)
        return Estimate(gaussian.delta_bounds(float(mu), epsilon)[1] if float(mu) < _LARGEST_MU else 1.0)

    def _check(self, form: NormalForm) -> None:
        if form.gaussian_mu is None:
            _limit(form)

    def _epsilon_interval(self, form: NormalForm, delta: float) -> Interval:
        return Interval(*gaussian.epsilon_bounds(_exact(form), delta))

    def _delta_interval(self, form: NormalForm, epsilon: float) -> Interval:
        return Interval(*gaussian.delta_bounds(_exact(form), epsilon))


_LARGEST_MU = 1e100  # beyond, mu^2 leaves the range of a double, and nothing is private


def _exact(form: NormalForm) -> float:
    mu = form.gaussian_mu
    if mu is None:
        raise UnsupportedEventError(
            f"GDPAccountant bounds un-sampled Gaussians only, got {[c for c, _ in form.counts]!r}. Sampled steps are "
            "Gaussian only in the limit: its epsilon and delta are estimates. For bounds use PRVAccountant."
        )
    return mu


def _limit(form: NormalForm) -> float:
    """mu by the central limit theorem: the squares of all components, added up."""
    return math.sqrt(math.fsum(count * _squared_mu(component) for component, count in form.counts))


def _squared_mu(component: object) -> float:
    if not isinstance(component, SampledNoise) or component.noise != "gaussian":
        raise UnsupportedEventError(
            f"GDPAccountant takes Gaussians, sampled or not, got {component!r}. Use PRVAccountant or RDPAccountant."
        )
    inverse = 1 / component.scale / component.scale
    if component.rate == 1:
        return inverse
    return component.rate**2 * math.expm1(inverse) if inverse < 500 else math.inf
