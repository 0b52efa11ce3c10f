"""deepee's accounting functions. What they call an epsilon is an upper bound here, or an `Estimate` that says so.

deepee takes the central limit of sampled Gaussians [1] for the truth, and the clipped sum to move by one clip norm
where batches of fixed size make it move by two. `compute_eps_uniform` is the certified bound of the same mechanism.

References:
    [1] Bu, Dong, Long, Su, Deep Learning with Gaussian Differential Privacy, 2019. arXiv:1911.11607, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from accountants import (
    Estimate,
    Gaussian,
    NeighboringRelation,
    PoissonSampled,
    PRVAccountant,
    SampledWithoutReplacement,
    arguments,
    rdp,
)
from dpdl.errors import ParameterError

__all__ = [
    "compute_eps_uniform",
    "compute_mu_uniform",
    "compute_rdp",
    "delta_eps_mu",
    "eps_from_mu",
    "get_privacy_spent",
]

LARGEST_EPSILON = 500.0  # deepee's search ends here, and raises
STEP_ROUNDING = 1e-9  # relative: epochs given as floats may lie this far above a whole number of steps


def compute_eps_uniform(epoch: float, noise_multi: float, n: int, batch_size: int, delta: float) -> float:
    """Upper bound on the epsilon of noisy sums over batches of fixed size, drawn without replacement.

    Args:
        epoch: passes over the data, not necessarily whole; part of a step counts as one.
        noise_multi: noise standard deviation / clip norm.
        n: examples in the data set.
        batch_size: examples in each batch.
        delta: in (0, 1).

    Returns:
        epsilon for replacing one example.

    Raises:
        ParameterError: an argument out of range, or an epsilon above 500.

    Example:
        >>> round(compute_eps_uniform(10, 1.0, 50_000, 200, 1e-5), 2)    # deepee: 1.31
        10.16
    """
    size = arguments.positive_whole("n", n, remedy="Count the examples.")
    batch = arguments.positive_whole("batch_size", batch_size, remedy="Count the examples in each batch.")
    passes = arguments.non_negative("epoch", epoch, remedy="Count passes over the data.")
    steps = math.ceil(passes * size / batch * (1 - STEP_ROUNDING))
    event = SampledWithoutReplacement(batch, size, Gaussian(noise_multi))
    for count in (min(steps, 1), steps):  # where one step is too much already, all of them would take seconds
        spent = PRVAccountant(relation=NeighboringRelation.REPLACE_ONE).compose(event * count).epsilon(delta)
        _plausible(spent)
    return spent


def compute_mu_uniform(epoch: float, noise_multi: float, n: int, batch_size: int) -> Estimate:
    """The mu of the central limit [1]: no bound, for comparison with what deepee has reported.

    Args:
        epoch, noise_multi, n, batch_size: as in `compute_eps_uniform`.

    Raises:
        ParameterError: noise_multi is not positive.
    """
    if not noise_multi > 0:
        raise ParameterError(f"noise_multi must be > 0, got {noise_multi}.")
    inverse = 1 / noise_multi
    root_steps = math.sqrt(epoch * n / batch_size)
    with np.errstate(over="ignore"):
        growth = np.exp(inverse * inverse) * ndtr(1.5 * inverse) + 3 * ndtr(-0.5 * inverse) - 2
    return Estimate(math.sqrt(2) * batch_size / n * root_steps * math.sqrt(growth))


def delta_eps_mu(eps: float, mu: float) -> float:
    """The delta of mu-Gaussian differential privacy (`mu`) at `eps`; an `Estimate` if mu is one.

    Raises:
        ParameterError: mu is not positive.
    """
    return _typed_as(mu, PRVAccountant().compose(_gaussian(mu)).delta(eps))


def eps_from_mu(mu: float, delta: float) -> float:
    """The epsilon of mu-Gaussian differential privacy (`mu`) at `delta`; an `Estimate` if mu is one.

    Raises:
        ParameterError: it is above 500.

    Example:
        >>> print(eps_from_mu(compute_mu_uniform(10, 1.0, 50_000, 200), 1e-5))    # what deepee calls the privacy spent
        ~1.308 (an estimate, not a bound)
    """
    return _typed_as(mu, _plausible(PRVAccountant().compose(_gaussian(mu)).epsilon(delta)))


def _gaussian(mu: float) -> Gaussian:
    if not mu > 0:
        raise ParameterError(f"mu must be > 0, got {float(mu)}.")
    return Gaussian(1 / float(mu))


def _typed_as(mu: float, value: float) -> float:
    return Estimate(value) if isinstance(mu, Estimate) else float(value)


def _plausible(spent: float) -> float:
    if spent > LARGEST_EPSILON:
        raise ParameterError(
            f"Epsilon is {spent:.6g}, above {LARGEST_EPSILON:g}: no guarantee. The noise multiplier is likely "
            "implausible; increase it, or take fewer steps."
        )
    return spent


def compute_rdp(
    q: float, noise_multiplier: float, steps: int, orders: Sequence[float] | float
) -> NDArray[np.float64] | float:
    """Rényi divergence of `steps` Poisson-sampled Gaussians at each order > 1, adding or removing one example.

    Not that of batches without replacement: deepee's watchdog falls back to it for those, and should not.

    Args:
        q: the sample rate.
        noise_multiplier: noise std over the clip norm.
        steps: how many.
        orders: one or several.

    Returns:
        One number, or shape [orders].
    """
    event = PoissonSampled(q, Gaussian(noise_multiplier))
    spent = rdp(event, orders) * arguments.steps(steps)
    return spent if np.ndim(orders) else float(spent)


def get_privacy_spent(
    orders: Sequence[float] | float, rdp: Sequence[float] | NDArray[np.float64] | float, delta: float
) -> tuple[float, float]:
    """The least epsilon at `delta` that Rényi divergences imply, rdp + log(1 / delta) / (order - 1), and its order.

    Args:
        orders: Rényi orders > 1, one or several.
        rdp: the divergences at these orders, of the same shape.
        delta: in (0, 1).

    Raises:
        ParameterError: as many orders as divergences are needed; delta in (0, 1).
    """
    at = arguments.orders(np.atleast_1d(orders))
    spent = np.atleast_1d(np.asarray(rdp, dtype=np.float64))
    if at.shape != spent.shape:
        raise ParameterError(
            f"Input lists must have the same length, got {at.size} orders and {spent.size} divergences."
        )
    candidates = spent - math.log(arguments.delta(delta)) / (at - 1)
    if np.isnan(candidates).all():
        return math.inf, math.nan
    best = int(np.nanargmin(candidates))
    return float(candidates[best]), float(at[best])
