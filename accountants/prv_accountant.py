"""The default accountant: numerical privacy-loss distributions with a certified interval.

Closed form where there is one (un-sampled Gaussians; a single step); elsewhere a lattice law above and one below the
truth, composed under an exponential tilt (`lattice`, `composition`), in both directions, and never above the Renyi
bound. The interval covers discretisation, truncation of tails, wrap-around and the negligible frequencies by proof,
and rounding by a model of it with a margin; it is not interval arithmetic.

Width of the interval: about 1e-4 of epsilon in training settings. It grows where the law of one step is both rare and
far (rate 1e-5 with noise multiplier 0.3), and where a bound fails the Renyi bound stands in: wider, never unsound.

Example:
    >>> from accountants.events import Gaussian, PoissonSampled
    >>> accountant = PRVAccountant().compose(PoissonSampled(0.01, Gaussian(1.0)), count=10_000)
    >>> low, high = accountant.interval(1e-5)
    >>> low < 6.187712 < high < 1.0001 * low
    True
"""

from __future__ import annotations

import functools
import math

from accountants import gaussian, one_step, rdp_accountant
from accountants.accountant import Accountant, Interval
from accountants.certificate import Certificate, is_separable, log_delta_interval
from accountants.components.component import DIRECTIONS, Direction
from accountants.normal_form import NormalForm


class PRVAccountant(Accountant):
    """Certified bounds on the tight epsilon and delta; see the module for what the certificate covers."""

    def _epsilon_interval(self, form: NormalForm, delta: float) -> Interval:
        mu = form.gaussian_mu
        if mu is not None:
            return Interval(*gaussian.epsilon_bounds(mu, delta))
        if form.has_pairs and form.is_one_step:
            return Interval(*one_step.epsilon_bounds(form.counts[0][0], delta))
        ceiling = rdp_accountant.epsilon_upper(form, delta)
        if ceiling == 0 or not form.has_pairs:
            return Interval(0.0, ceiling)
        counts = [count for _, count in form.counts]
        bucket = _bucket(form)
        lower = upper = 0.0
        for direction in DIRECTIONS:
            certificate = _certificate(bucket, direction, delta)
            if upper > 0 and certificate.is_below(counts, upper):
                continue
            bound = certificate.upper(counts, ceiling)
            lower = max(lower, certificate.lower(counts, bound))
            upper = max(upper, bound)
        return Interval(lower, upper)

    def _delta_interval(self, form: NormalForm, epsilon: float) -> Interval:
        mu = form.gaussian_mu
        if mu is not None:
            return Interval(*gaussian.delta_bounds(mu, epsilon))
        if not form.has_pairs:
            return Interval(0.0, rdp_accountant.delta_upper(form, epsilon))
        if form.is_one_step:
            return Interval(*one_step.delta_bounds(form.counts[0][0], epsilon))
        lower = upper = -math.inf
        for direction in DIRECTIONS:
            low, high = log_delta_interval(form, direction, epsilon, known=lower)
            lower, upper = max(lower, low), max(upper, high)
        ceiling = min(1.0, math.exp(min(upper, 0.0)) * (1 + 1e-13))
        return Interval(min(math.exp(min(lower, 0.0)) * (1 - 1e-13), ceiling), ceiling)


def _bucket(form: NormalForm) -> NormalForm:
    """Counts rounded up to powers of two, so that a growing run shares its laws."""
    if not is_separable(form):
        return form
    return NormalForm(tuple((component, 1 << (count - 1).bit_length()) for component, count in form.counts))


@functools.lru_cache(maxsize=12)  # at most about 25 MB each, usually 3
def _certificate(form: NormalForm, direction: Direction, delta: float) -> Certificate:
    return Certificate(form, direction, delta)
