"""What an attacker can do with a release: bounds on any membership or reconstruction attack.

Each function bounds from above every attacker who sees everything that was released (each noisy step of a training
run, not only the final model), knows every example but one, and has unlimited time. Weaker attackers do worse; none
does better. "Member" means that the example was in the data set, under the neighbouring relation of the question.

    advantage                   true positive rate - false positive rate
    tpr_at_fpr                  true positive rate when few false accusations are allowed
    positive_predictive_value   how often an accusation is right
    bayes_accuracy              how often the best guess is right
    posterior                   how sure the attacker may become, but for a small probability
    reconstruction              how often the whole example is recovered

All follow from the privacy curve delta(epsilon) by the trade-off curve: with alpha the false and 1 - beta the true
positive rate, 1 - beta <= e^eps alpha + delta(eps), and the same with the two neighbours exchanged. Where these are
not alike (sampled noise), each bound is for the worse of the two roles. Bounds are rounded up.

References:
    [1] Kairouz, Oh, Viswanath, The Composition Theorem for Differential Privacy, 2015. arXiv:1311.0776, Theorem 2.1
    [2] Dong, Roth, Su, Gaussian Differential Privacy, 2019. arXiv:1905.02383, section 2
    [3] Jayaraman, Wang, Knipmeyer, Gu, Evans, Revisiting Membership Inference Under Realistic Assumptions, 2021.
        arXiv:2005.10881
    [4] Balle, Cherubin, Hayes, Reconstructing Training Data with Informed Adversaries, 2022. arXiv:2201.04845
    [5] Hayes, Mahloujifar, Balle, Bounding Training Data Reconstruction in DP-SGD, 2023. arXiv:2302.07225
    [6] Kaissis, Hayes, Ziller, Rueckert, Bounding data reconstruction attacks with the hypothesis testing
        interpretation of differential privacy, 2023. arXiv:2307.03928
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from accountants import arguments
from accountants.components.component import Array
from accountants.errors import ParameterError
from accountants.events import Event
from accountants.meaning.trade_off_curve import spent_by, trade_off
from accountants.queries import AccountantName
from accountants.relation import NeighboringRelation

_ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE
_ROUNDING = 1e-15  # of a few operations on numbers at most 1
_SHARES = (0.5, 0.2, 0.1, 0.03, 0.01)  # of the failure probability: deltas at which `posterior` reads the curve
_LEAST_DELTA = 1e-300  # below it a share of the failure probability loses digits


def advantage(
    event: Event, *, accountant: AccountantName | str = "prv", relation: NeighboringRelation | str = _ADD_OR_REMOVE
) -> float:
    """Upper bound on true positive rate - false positive rate, of any membership attack: delta(0) [1].

    Args:
        event: what was released.
        accountant: which one bounds the privacy curve.
        relation: the neighbouring relation.

    Returns:
        The total variation distance that neighbours can have, in [0, 1].

    Raises:
        ParameterError: not an event, an unknown accountant or relation.
        UnsupportedEventError: the accountant has no proof for this event.

    Example:
        >>> from accountants.events import Gaussian
        >>> round(advantage(Gaussian(2.0)), 4)
        0.1974
    """
    return spent_by(event, accountant=accountant, relation=relation).delta_interval(0.0).upper


def tpr_at_fpr(
    event: Event,
    fpr: ArrayLike,
    *,
    accountant: AccountantName | str = "prv",
    relation: NeighboringRelation | str = _ADD_OR_REMOVE,
) -> Array:
    """Upper bound on the true positive rate of any membership attack whose false positive rate is at most `fpr` [2].

    Args:
        event: what was released.
        fpr: false positive rates, in [0, 1], any shape.
        accountant: as in `advantage`.
        relation: the neighbouring relation.

    Returns:
        1 - trade_off(fpr), same shape, in [fpr, 1].

    Raises:
        ParameterError: an fpr outside [0, 1]; otherwise as in `advantage`.
        UnsupportedEventError: as in `advantage`.

    Example:
        >>> from accountants.events import Gaussian
        >>> tpr_at_fpr(Gaussian(2.0), [1e-3, 1e-2]).round(5)
        array([0.0048, 0.0339])
    """
    rates = _rates("fpr", fpr)
    beta = trade_off(event, rates, accountant=accountant, relation=relation)
    return np.minimum(np.maximum(1 - beta + _ROUNDING, rates), 1.0)


def positive_predictive_value(
    event: Event,
    prior: float,
    fpr: ArrayLike,
    *,
    accountant: AccountantName | str = "prv",
    relation: NeighboringRelation | str = _ADD_OR_REMOVE,
) -> Array:
    """Upper bound on the share of accusations ("this one was a member") that are right [3].

        PPV = p TPR / (p TPR + (1 - p) FPR)

    It bounds every attack whose false positive rate is `fpr` or more. An attack that accuses more rarely can be
    surer of the few: see `posterior`.

    Args:
        event: what was released.
        prior: share p of members among those whom the attacker asks about, in (0, 1).
        fpr: false positive rates, in [0, 1], any shape; at 0 nothing is excluded and the bound is 1.
        accountant: as in `advantage`.
        relation: the neighbouring relation.

    Returns:
        Same shape as fpr, in [prior, 1].

    Raises:
        ParameterError: a prior outside (0, 1) or an fpr outside [0, 1]; otherwise as in `advantage`.
        UnsupportedEventError: as in `advantage`.

    Example:
        >>> from accountants.events import Gaussian
        >>> positive_predictive_value(Gaussian(2.0), 0.01, [1e-3, 1e-2]).round(4)
        array([0.0462, 0.0331])
    """
    share, rates = _prior(prior), _rates("fpr", fpr)
    right = share * tpr_at_fpr(event, rates, accountant=accountant, relation=relation)
    value = np.divide(right, right + (1 - share) * rates, out=np.ones(rates.shape), where=rates > 0)
    return np.clip(value * (1 + _ROUNDING), share, 1.0)


def bayes_accuracy(
    event: Event,
    prior: float,
    *,
    accountant: AccountantName | str = "prv",
    relation: NeighboringRelation | str = _ADD_OR_REMOVE,
) -> float:
    """Upper bound on how often any attacker, who knows the prior, guesses membership right.

        accuracy <= max(p, 1 - p) + min(p, 1 - p) delta(|log((1 - p) / p)|)

    For p <= 1/2 and eps = log((1 - p) / p), accuracy = 1 - p + p (TPR - e^eps FPR); for p > 1/2 the roles of the
    neighbours are exchanged.

    Args:
        event: what was released.
        prior: probability p that the example is a member, in (0, 1).
        accountant: as in `advantage`.
        relation: the neighbouring relation.

    Returns:
        In [max(p, 1 - p), 1]; the lower end is what guessing without looking achieves.

    Raises:
        ParameterError: a prior outside (0, 1); otherwise as in `advantage`.
        UnsupportedEventError: as in `advantage`.

    Example:
        >>> from accountants.events import Gaussian
        >>> round(bayes_accuracy(Gaussian(2.0), 0.5), 4), round(bayes_accuracy(Gaussian(2.0), 0.1), 4)
        (0.5987, 0.9)
    """
    share = _prior(prior)
    rarer, commoner = min(share, 1 - share), max(share, 1 - share)
    # Rounded down, where delta is larger.
    epsilon = max(0.0, math.log(commoner / rarer) * (1 - 4 * _ROUNDING) - 4 * _ROUNDING)
    delta = spent_by(event, accountant=accountant, relation=relation).delta_interval(epsilon).upper
    return min(1.0, (commoner + rarer * delta) * (1 + _ROUNDING))


def posterior(
    event: Event,
    prior: float,
    *,
    failure: float,
    accountant: AccountantName | str = "prv",
    relation: NeighboringRelation | str = _ADD_OR_REMOVE,
) -> float:
    """A belief in membership that an attacker's posterior exceeds with probability at most `failure`.

    The posterior odds are the prior odds times e^L, L the privacy loss of what was released. With Gaussian noise L has
    no bound: any belief below 1 is exceeded by some outcome, so no bound holds without a probability. For e < eps,

        Pr(L >= eps) <= delta(e) / (1 - e^(e - eps)),

    under membership, and under non-membership with a further factor e^-eps; the smallest such eps over several e is
    used. The probability is over the mechanism's randomness, whether or not the example is a member.

    Args:
        event: what was released.
        prior: the attacker's belief before, in (0, 1).
        failure: in (0, 1).
        accountant: as in `advantage`.
        relation: the neighbouring relation.

    Returns:
        In [prior, 1].

    Raises:
        ParameterError: a prior or a failure outside (0, 1); otherwise as in `advantage`.
        UnsupportedEventError: as in `advantage`.

    Example:
        >>> from accountants.events import Gaussian
        >>> round(posterior(Gaussian(2.0), 0.01, failure=1e-3), 3)
        0.058
    """
    share = _prior(prior)
    remedy = "Give the probability with which the bound may fail, for example 1e-3."
    probability = arguments.real("failure", failure, remedy=remedy)
    if not 0 < probability < 1:
        raise ParameterError(f"failure must be in (0, 1), got {probability!r}. {remedy}")
    spent = spent_by(event, accountant=accountant, relation=relation)
    deltas = [part * probability for part in _SHARES if part * probability > _LEAST_DELTA]
    losses = [spent.interval(delta).upper - math.log1p(-delta / probability) for delta in deltas]
    loss = min(losses, default=math.inf)
    odds_against = math.exp(-loss) * (1 - share) / share
    return min(1.0, max(share, 1 / (1 + odds_against) * (1 + 4 * _ROUNDING)))


def reconstruction(
    event: Event,
    baseline: ArrayLike,
    *,
    accountant: AccountantName | str = "prv",
    relation: NeighboringRelation | str = _ADD_OR_REMOVE,
) -> Array:
    """Upper bound on the probability that an attacker recovers an example, well enough to count [4, 5, 6].

    The attacker knows every other example and a prior over this one. A reconstruction counts if it is within some
    error of the example; the prior success is the probability of the best guess without looking at the release.
    Success with it is at most the blow-up 1 - trade_off(baseline) [5], whatever the error is.

    Args:
        event: what was released.
        baseline: prior success probabilities, in [0, 1], any shape.
        accountant: as in `advantage`.
        relation: the neighbouring relation.

    Returns:
        Same shape as baseline, in [baseline, 1].

    Raises:
        ParameterError: a baseline outside [0, 1]; otherwise as in `advantage`.
        UnsupportedEventError: as in `advantage`.

    Example:
        >>> from accountants.events import Gaussian
        >>> reconstruction(Gaussian(2.0), [1e-4, 1e-2]).round(5)
        array([0.00064, 0.0339 ])
    """
    return tpr_at_fpr(event, _rates("baseline", baseline), accountant=accountant, relation=relation)


def _rates(name: str, value: ArrayLike) -> Array:
    return arguments.probabilities(name, value, remedy="Give probabilities such as [0.001, 0.01].")


def _prior(value: float) -> float:
    remedy = "Give the share of members among the candidates, for example 0.5."
    prior = arguments.real("prior", value, remedy=remedy)
    if not 0 < prior < 1:
        raise ParameterError(f"prior must be in (0, 1), both ends excluded, got {prior!r}. {remedy}")
    return prior
