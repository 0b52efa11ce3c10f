"""From counted guesses to lower bounds on epsilon that hold with a stated confidence.

    clopper_pearson(3, 100, confidence=0.95)                  # a probability, from trials
    epsilon_of_rates(fpr, fnr, delta=1e-5)                    # epsilon, from a test's two error rates
    mu_of_rates(fpr, fnr)                                     # mu of Gaussian differential privacy, from the same
    one_run_epsilon(75, 100, 1000, delta=1e-4, confidence=0.95)   # epsilon, from guesses about coins of one run

An attacker who tells two neighbouring data sets apart makes two kinds of errors, and (epsilon, delta) bounds both from
below [2]:

    FPR + e^eps FNR >= 1 - delta     and     e^eps FPR + FNR >= 1 - delta

Upper limits of the two error rates therefore give a lower limit of epsilon. Rates come from independent runs; where
there is one run only, guesses about many coins of that run take their place [3].

Failure probabilities are for each call. Whoever takes the best of k bounds must divide the failure by k, or choose on
other trials.

References:
    [1] Clopper, Pearson, The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial, 1934.
    [2] Kairouz, Oh, Viswanath, The Composition Theorem for Differential Privacy, 2015. arXiv:1311.0776, Theorem 2.1
    [3] Steinke, Nasr, Jagielski, Privacy Auditing with One (1) Training Run, 2023. arXiv:2305.08846, Theorem 5.2
    [4] Dong, Roth, Su, Gaussian Differential Privacy, 2019. arXiv:1905.02383
    [5] Nasr et al., Tight Auditing of Differentially Private Machine Learning, 2023. arXiv:2302.07956
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from accountants import Gaussian, PRVAccountant, arguments
from dpdl.errors import ParameterError

__all__ = [
    "clopper_pearson",
    "epsilon_of_mu",
    "epsilon_of_rates",
    "mu_of_epsilon",
    "mu_of_rates",
    "one_run_epsilon",
    "one_run_p_value",
    "rate_at_least",
    "rate_at_most",
]

# Of the tails computed here, relative: of 1e6 guesses, logarithms of factorials are good to 1e-9.
_ROUNDING = 1e-8
_RATE_ROUNDING = 1e-12  # of scipy's inverse of the incomplete beta function
_BISECTIONS = 50  # of an interval at most 64 wide: to 1e-13
_LARGEST_EPSILON = 64.0  # no count of guesses that fits in memory refutes more


def rate_at_most(successes: int, trials: int, *, failure: float) -> float:
    """Upper confidence limit of a probability, from independent trials [1].

    Args:
        successes: how many of the trials, in [0, trials].
        trials: >= 1.
        failure: in (0, 1): how often the limit may be below the probability.

    Returns:
        The least p with P[Binomial(trials, p) <= successes] <= failure, in (0, 1].

    Raises:
        ParameterError: counts or failure are out of range.

    Example:
        >>> round(rate_at_most(0, 100, failure=0.05), 4)  # near 3 / 100
        0.0295
    """
    _counts(successes, trials)
    _refuse_outside("failure", failure)
    if successes == trials:
        return 1.0
    # 1 - I(a, b; p): the complement keeps its digits where the failure is small.
    return min(1.0, float(special.betainccinv(successes + 1, trials - successes, failure)) * (1 + _RATE_ROUNDING))


def rate_at_least(successes: int, trials: int, *, failure: float) -> float:
    """Lower confidence limit of a probability, from independent trials [1]: as `rate_at_most`, of the other side.

    Example:
        >>> round(rate_at_least(100, 100, failure=0.05), 4)
        0.9705
    """
    _counts(successes, trials)
    _refuse_outside("failure", failure)
    if successes == 0:
        return 0.0
    return float(special.betaincinv(successes, trials - successes + 1, failure)) * (1 - _RATE_ROUNDING)


def clopper_pearson(successes: int, trials: int, *, confidence: float) -> tuple[float, float]:
    """Two-sided confidence limits of a probability, from independent trials [1].

    Args:
        successes: how many of the trials, in [0, trials].
        trials: >= 1.
        confidence: in (0, 1): how often, at least, both limits hold; each fails half as often as both.

    Returns:
        (lower, upper).

    Raises:
        ParameterError: counts or confidence are out of range.

    Example:
        >>> [round(limit, 4) for limit in clopper_pearson(3, 100, confidence=0.95)]
        [0.0062, 0.0852]
    """
    _refuse_outside("confidence", confidence)
    failure = (1 - confidence) / 2
    return rate_at_least(successes, trials, failure=failure), rate_at_most(successes, trials, failure=failure)


def epsilon_of_rates(fpr: float, fnr: float, *, delta: float) -> float:
    """The least epsilon at which a test may have such error rates [2].

    Args:
        fpr: upper limit of the false positive rate, in [0, 1].
        fnr: upper limit of the false negative rate, in [0, 1]; both limits must hold together.
        delta: in [0, 1).

    Returns:
        max(0, log((1 - delta - fnr) / fpr), log((1 - delta - fpr) / fnr)); infinite where a rate is 0 and the other's
        complement exceeds delta.

    Raises:
        ParameterError: a number is out of range.

    Example:
        >>> round(epsilon_of_rates(0.01, 0.5, delta=1e-5), 3)
        3.912
    """
    _refuse_rates(fpr, fnr)
    if not 0 <= delta < 1:
        raise ParameterError(f"delta must be in [0, 1), got {delta!r}.")
    found = 0.0
    for rare, other in ((fpr, fnr), (fnr, fpr)):
        seen = 1 - delta - other
        if seen > 0:
            found = max(found, math.log(seen / rare) if rare > 0 else math.inf)
    return found


def mu_of_rates(fpr: float, fnr: float) -> float:
    """The least mu of Gaussian differential privacy at which a test may have such error rates.

    A mu-GDP mechanism has FNR >= Phi(Phi^-1(1 - FPR) - mu) for every test [4, Definition 2.4]; what is returned is a
    lower limit of mu [5, section 4]. For any mechanism it refutes every smaller mu. To go on from it to an epsilon
    (`epsilon_of_mu`) needs the assumption that the mechanism's trade-off curve is Gaussian: of another one, that
    touches the Gaussian curve in this point only, epsilon may be smaller.

    Args:
        fpr, fnr: upper limits, as in `epsilon_of_rates`.

    Returns:
        max(0, Phi^-1(1 - fpr) - Phi^-1(fnr)).

    Raises:
        ParameterError: a rate is out of range.

    Example:
        >>> round(mu_of_rates(0.1587, 0.1587), 3)
        2.0
    """
    _refuse_rates(fpr, fnr)
    return max(0.0, float(-special.ndtri(fpr) - special.ndtri(fnr)))


def epsilon_of_mu(mu: float, *, delta: float) -> float:
    """Epsilon at delta of a mechanism whose trade-off curve is that of mu-GDP, rounded down.

    Args:
        mu: >= 0: the sensitivity over the standard deviation.
        delta: in (0, 1).

    Raises:
        ParameterError: a number is out of range.

    Example:
        >>> round(epsilon_of_mu(1.0, delta=1e-5), 3)
        4.377
    """
    if not mu >= 0:
        raise ParameterError(f"mu must be >= 0, got {mu!r}.")
    if mu == 0:
        return 0.0
    if math.isinf(mu):
        return math.inf
    return PRVAccountant().compose(Gaussian(1 / mu)).interval(delta).lower


def mu_of_epsilon(epsilon: float, *, delta: float) -> float:
    """The largest mu whose Gaussian curve stays within (epsilon, delta): the inverse of `epsilon_of_mu`, rounded up.

    Args:
        epsilon: >= 0, finite.
        delta: in (0, 1).

    Raises:
        ParameterError: a number is out of range.

    Example:
        >>> round(mu_of_epsilon(4.377, delta=1e-5), 3)
        1.0
    """
    if not 0 <= epsilon < math.inf:
        raise ParameterError(f"epsilon must be finite and >= 0, got {epsilon!r}.")
    low, high = 0.0, 1.0
    while epsilon_of_mu(high, delta=delta) <= epsilon:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if epsilon_of_mu(middle, delta=delta) <= epsilon else (low, middle)
    return high


def one_run_p_value(right: int, guesses: int, candidates: int, *, epsilon: float, delta: float) -> float:
    """How probable, at most, so many right guesses are, if the run is (epsilon, delta)-private [3, Theorem 5.2].

    A fair coin for each candidate decides whether it is in the data; the attacker sees what the run released and
    guesses `guesses` of the coins. Then, with W of the binomial law (guesses, q = e^eps / (1 + e^eps)),

        P[at least `right` guesses are right] <= P[W >= right] + 2 m delta max_i P[right > W >= right - i] / i,

    the maximum over i = 1, ..., m, m = candidates. For i > right the probability stays and the quotient falls: these
    need no look.

    Args:
        right: right guesses, in [0, guesses].
        guesses: how many coins were guessed; a number that does not depend on the counted coins.
        candidates: how many coins there were.
        epsilon: >= 0.
        delta: in [0, 1].

    Returns:
        The bound, in [0, 1], rounded up.

    Raises:
        ParameterError: counts or numbers are out of range.

    Example:
        >>> round(one_run_p_value(95, 100, 1000, epsilon=2.0, delta=1e-5), 4)
        0.0178
    """
    _counts(right, guesses, "right", "guesses")
    _counts(guesses, candidates, "guesses", "candidates")
    if not epsilon >= 0:
        raise ParameterError(f"epsilon must be >= 0, got {epsilon!r}.")
    if not 0 <= delta <= 1:
        raise ParameterError(f"delta must be in [0, 1], got {delta!r}.")
    if right == 0 or math.isinf(epsilon):
        return 1.0
    # q and 1 - q from e^-eps, so that neither is a difference of numbers near 1.
    log_q, log_rest = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    # P[W >= right] = I(right, guesses - right + 1; q), the regularised incomplete beta function; its complement in
    # 1 - q where q is near 1.
    a, b = right, guesses - right + 1
    tail = (
        float(special.betaincc(b, a, math.exp(log_rest)))
        if epsilon > 1
        else float(special.betainc(a, b, math.exp(log_q)))
    )
    correction = 0.0
    if delta > 0:
        w = np.arange(right - 1, -1, -1, dtype=np.float64)
        log_choose = special.gammaln(guesses + 1) - special.gammaln(w + 1) - special.gammaln(guesses - w + 1)
        below = np.cumsum(np.exp(log_choose + w * log_q + (guesses - w) * log_rest))
        correction = 2 * candidates * delta * float(np.max(below / np.arange(1, right + 1)))
    return min(1.0, (tail + correction) * (1 + _ROUNDING))


def one_run_epsilon(right: int, guesses: int, candidates: int, *, delta: float, confidence: float) -> float:
    """A lower bound on epsilon from right guesses about the coins of one run [3, Theorem 5.2].

    Args:
        right, guesses, candidates: as in `one_run_p_value`.
        delta: in [0, 1].
        confidence: in (0, 1).

    Returns:
        An epsilon that is refuted: its p-value is at most 1 - confidence. With it, all smaller ones are, for
        what is private with a smaller epsilon is private with this one. 0 if none is.

    Guarantee:
        Of (epsilon, delta)-private runs, at most a share of 1 - confidence gives a bound above epsilon.

    Raises:
        ParameterError: counts or numbers are out of range.

    Example:
        >>> round(one_run_epsilon(75, 100, 1000, delta=1e-4, confidence=0.95), 3)  # as [3, appendix D] has it
        0.673
    """
    _refuse_outside("confidence", confidence)
    failure = 1 - confidence

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(right, guesses, candidates, epsilon=epsilon, delta=delta) <= failure

    low, high = 0.0, _LARGEST_EPSILON
    for _ in range(_BISECTIONS):  # whatever `low` becomes has itself been refuted
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _counts(part: int, whole: int, name: str = "successes", of: str = "trials") -> None:
    arguments.positive_whole(of, whole, remedy="Count what was tried.")
    if isinstance(part, bool) or int(part) != part or not 0 <= part <= whole:
        raise ParameterError(f"{name} must be a whole number in [0, {of} = {whole}], got {part!r}.")


def _refuse_outside(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ParameterError(f"{name} must be in (0, 1), got {value!r}.")


def _refuse_rates(fpr: float, fnr: float) -> None:
    for name, rate in (("fpr", fpr), ("fnr", fnr)):
        if not 0 <= rate <= 1:
            raise ParameterError(f"{name} must be in [0, 1], got {rate!r}.")
