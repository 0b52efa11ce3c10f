"""Gaussian differential privacy, exact and nothing else: un-sampled Gaussians compose to one Gaussian.

    mu^2 = sum of 1 / noise_multiplier^2,   beta(alpha) = Phi(Phi^-1(1 - alpha) - mu)            [1, Corollary 3.3]

The central limit theorem for sampled Gaussians is not here: it approximates, on either side (3.06 for a true 5.23
at rate 1e-3, noise multiplier 0.5, 10,000 steps, delta 1e-5).

References:
    [1] Dong, Roth, Su, Gaussian Differential Privacy, 2019. arXiv:1905.02383
"""

from __future__ import annotations

from accountants import gaussian
from accountants.accountant import Accountant, Interval
from accountants.errors import UnsupportedEventError
from accountants.normal_form import NormalForm


class GDPAccountant(Accountant):
    """Closed form for compositions of un-sampled Gaussians; refuses everything else.

    Example:
        >>> from accountants.events import Gaussian
        >>> round(GDPAccountant().compose(Gaussian(5.0), count=25).epsilon(1e-5), 6)
        4.377178
    """

    @property
    def mu(self) -> float:
        """The Gaussian parameter of everything composed so far; inf without noise."""
        return _mu(self._normal_form())

    def _check(self, form: NormalForm) -> None:
        _mu(form)

    def _epsilon_interval(self, form: NormalForm, delta: float) -> Interval:
        return Interval(*gaussian.epsilon_bounds(_mu(form), delta))

    def _delta_interval(self, form: NormalForm, epsilon: float) -> Interval:
        return Interval(*gaussian.delta_bounds(_mu(form), epsilon))


def _mu(form: NormalForm) -> float:
    mu = form.gaussian_mu
    if mu is None:
        raise UnsupportedEventError(
            f"GDPAccountant takes un-sampled Gaussians only, got {[c for c, _ in form.counts]!r}. Sampled steps are "
            "Gaussian only in the limit, and the limit can be below the truth; use PRVAccountant."
        )
    return mu
