"""The default accountant: the privacy loss of everything together, with a certified interval.

Closed form where there is one (un-sampled Gaussians; a single step). Compositions of Poisson-sampled Gaussians are
inverted along a line in the complex plane (`contour`); everything else, and what the line does not serve, by a lattice
law above and one below the truth, composed under an exponential tilt (`lattice`, `composition`), never above the Renyi
bound. Both directions are taken, and the larger.

The interval covers truncation of tails, discretisation or quadrature, wrap-around and the frequencies left out by
proof, and rounding by a model of it with a margin; it is not interval arithmetic. Where more than 32 noise multipliers
share a rate, a few stand for them, and the interval covers the measured difference that two numbers of them make.

Width of the interval: 1e-8 of epsilon in training settings, 2e-5 where the lattice is needed. Components that are known
by their moments only make the upper bound that of `RDPAccountant`, the lower one 0.

Example:
    >>> from accountants.events import Gaussian, PoissonSampled
    >>> accountant = PRVAccountant().compose(PoissonSampled(0.01, Gaussian(1.0)), count=10_000)
    >>> low, high = accountant.interval(1e-5)
    >>> 6.187712 < low < high < 6.187713
    True
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

from accountants.accountant import GREATEST_EPSILON, Accountant
from accountants.components.component import DIRECTIONS, Direction
from accountants.engines import gaussian, leaks, one_step, prv_package, renyi_bound
from accountants.engines.contour_certificate import ContourCertificate, ContourProfile
from accountants.engines.lattice_certificate import LatticeCertificate, is_separable, log_delta_interval
from accountants.errors import ParameterError, PrivacyError
from accountants.interval import Interval
from accountants.reduction.normal_form import NormalForm
from accountants.relation import NeighboringRelation

_CONTRADICTION = 1e-6  # relative, of a lower bound above the upper one, beyond any rounding
_LOOSE = 0.9  # a lower bound below this share of the upper one is compared with single steps
_MOST_COMPARED = 64  # of them


class PRVAccountant(Accountant):
    """Certified bounds on the tight epsilon and delta; see the module for what the certificate covers.

    Args:
        relation: the neighbouring relation of every answer.
        engine: "certified", or "prv-accountant" for the package of that name, as a cross-check (`prv_package` says
            what it cannot do; that is refused).

    Raises:
        ParameterError: no engine, or no relation, of that name.

    References:
        Gopi, Lee, Wutschitz, Numerical Composition of Differential Privacy, 2021. arXiv:2106.02848: composition of
        privacy loss random variables. The certificate is this module's.
    """

    def __init__(
        self,
        *,
        relation: NeighboringRelation | str = NeighboringRelation.ADD_OR_REMOVE,
        engine: Literal["certified", "prv-accountant"] = "certified",
    ) -> None:
        super().__init__(relation=relation)
        if engine not in ("certified", "prv-accountant"):
            raise ParameterError(f"engine must be 'certified' or 'prv-accountant', got {engine!r}.")
        self._engine = engine

    def _epsilon_interval(self, form: NormalForm, delta: float) -> Interval:
        if self._engine == "prv-accountant":
            return prv_package.epsilon_interval(form, delta)
        mu = form.gaussian_mu
        if mu is not None:
            return Interval(*gaussian.epsilon_bounds(mu, delta))
        if form.has_pairs and form.is_one_step:
            return Interval(*one_step.epsilon_bounds(form.counts[0][0], delta))
        if not form.has_pairs:
            return Interval(0.0, renyi_bound.epsilon_upper(form, delta))
        if (revealed := leaks.delta_beyond_losses(form, 0.0)) is not None:
            return Interval(*(0.0 if bound <= delta else math.inf for bound in revealed))
        bucket = _bucket(form)
        lower = upper = 0.0
        for direction in DIRECTIONS:
            low, high = _directed_interval(form, bucket, direction, delta, upper)
            lower, upper = max(lower, low), max(upper, high)
        if upper > 0 and lower < _LOOSE * upper:
            lower = max(lower, _dearest_step(form, delta))
        if lower > upper * (1 + _CONTRADICTION):
            raise PrivacyError(
                f"the bounds on epsilon contradict each other: not below {lower!r}, not above {upper!r}. "
                "This is a defect of this package: please report the plan. RDPAccountant answers by other means."
            )
        return Interval(min(lower, upper), upper)

    def _delta_interval(self, form: NormalForm, epsilon: float) -> Interval:
        if self._engine == "prv-accountant":
            return prv_package.delta_interval(form, epsilon)
        mu = form.gaussian_mu
        if mu is not None:
            return Interval(*gaussian.delta_bounds(mu, epsilon))
        if not form.has_pairs:
            return Interval(0.0, renyi_bound.delta_upper(form, epsilon))
        if form.is_one_step:
            return Interval(*one_step.delta_bounds(form.counts[0][0], epsilon))
        return self._deltas(form, [epsilon])[0]

    def _delta_bounds(self, epsilons: Sequence[float]) -> list[float]:
        """As for every accountant; neighbouring epsilons share their transforms."""
        checked = [min(epsilon, GREATEST_EPSILON) for epsilon in epsilons]
        form = self._normal_form()
        if (
            self._engine == "prv-accountant"
            or form.unbounded
            or form.gaussian_mu is not None
            or not form.has_pairs
            or form.is_one_step
        ):
            return super()._delta_bounds(checked)
        known = dict(zip(sorted(checked), self._deltas(form, sorted(checked)), strict=True))
        return [known[epsilon].upper for epsilon in checked]

    def _deltas(self, form: NormalForm, epsilons: Sequence[float]) -> list[Interval]:
        profiles = {direction: ContourProfile(form, direction) for direction in DIRECTIONS}
        intervals = []
        for epsilon in epsilons:
            if (revealed := leaks.delta_beyond_losses(form, epsilon)) is not None:
                intervals.append(Interval(*revealed))
                continue
            lower = upper = -math.inf
            for direction, profile in profiles.items():
                bounds = profile.log_delta_interval(epsilon)
                low, high = bounds or log_delta_interval(form, direction, epsilon, known=lower)
                lower, upper = max(lower, low), max(upper, high)
            ceiling = min(1.0, max(math.exp(min(upper, 0.0)) * (1 + 1e-13), renyi_bound.LEAST_DELTA))
            intervals.append(Interval(min(math.exp(min(lower, 0.0)) * (1 - 1e-13), ceiling), ceiling))
        return intervals


def _directed_interval(
    form: NormalForm, bucket: NormalForm, direction: Direction, delta: float, known: float
) -> tuple[float, float]:
    """Bounds in one direction; (0, 0) if they are below `known`, which the other direction spends anyway."""
    counts = [count for _, count in form.counts]
    shared, own = (bucket, 0.5), (form, 1.0)  # with laws that serve fewer steps too, and with laws of its own
    for law, least in (shared, own) if form != bucket else (shared,):
        contour = _contour_certificate(law, direction, delta, least)
        if known > 0 and contour.is_below(known):
            return 0.0, 0.0
        if (found := contour.interval(counts)) is not None:
            return found
    return _lattice_interval(form, bucket, direction, delta, known)


def _lattice_interval(
    form: NormalForm, bucket: NormalForm, direction: Direction, delta: float, known: float
) -> tuple[float, float]:
    """Bounds in one direction from lattice laws; no better than `known` if they are below that anyway."""
    counts = [count for _, count in form.counts]
    ceiling = renyi_bound.epsilon_upper(form, delta)
    if ceiling == 0:
        return 0.0, 0.0
    certificate = _certificate(bucket, direction, delta)
    if 0 < known < math.inf and certificate.is_below(counts, known):
        return 0.0, 0.0
    upper = certificate.upper(counts, ceiling)
    return certificate.lower(counts, upper), upper


def _dearest_step(form: NormalForm, delta: float) -> float:
    """Lower bound from one step alone: more steps never spend less."""
    components = [component for component, _ in form.counts[:_MOST_COMPARED]]
    return max(one_step.epsilon_bounds(component, delta)[0] for component in components)


def _bucket(form: NormalForm) -> NormalForm:
    """Counts rounded up to powers of two, so that a growing run shares its laws."""
    if not is_separable(form):
        return form
    return NormalForm(tuple((component, 1 << (count - 1).bit_length()) for component, count in form.counts))


@functools.lru_cache(maxsize=32)  # usually well below 1 MB each
def _contour_certificate(form: NormalForm, direction: Direction, delta: float, least: float) -> ContourCertificate:
    return ContourCertificate(form, direction, delta, least)


@functools.lru_cache(maxsize=12)  # at most about 25 MB each, usually 3
def _certificate(form: NormalForm, direction: Direction, delta: float) -> LatticeCertificate:
    return LatticeCertificate(form, direction, delta)
