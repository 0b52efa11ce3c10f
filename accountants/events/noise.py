"""One noisy answer, each example's share of it bounded."""

from __future__ import annotations

import dataclasses

from accountants import arguments
from accountants.errors import ParameterError
from accountants.events.event import Event


@dataclasses.dataclass(frozen=True)
class Gaussian(Event, kind="gaussian"):
    """f(x) + N(0, noise_multiplier^2 I), where f moves by at most 1 in L2 norm.

    The unit is the clip norm: noise_multiplier = noise std / clip norm, for every neighbouring relation.
    Under add/remove and zero-out, the mechanism is dominated by the pair N(0, s^2), N(1, s^2); under replacement
    by N(0, s^2), N(2, s^2).

    Args:
        noise_multiplier: s >= 0, finite; 0 releases f(x) itself, and epsilon is infinite.

    References:
        Balle, Wang, Improving the Gaussian Mechanism for Differential Privacy: Analytical Calibration and Optimal
        Denoising, 2018. arXiv:1805.06530
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", arguments.noise_scale("noise_multiplier", self.noise_multiplier))


@dataclasses.dataclass(frozen=True)
class Laplace(Event, kind="laplace"):
    """f(x) + Laplace noise of scale `scale` (density exp(-|z| / scale) / (2 scale)), f real with sensitivity 1.

    Dominated by the pair Lap(0, b), Lap(1, b) under add/remove and zero-out, Lap(0, b), Lap(2, b) under
    replacement. One release is (1 / b)-differentially private with delta = 0 under add/remove.

    Args:
        scale: b >= 0, finite, in units of the sensitivity; 0 releases f(x) itself, and epsilon is infinite.

    References:
        Dwork, McSherry, Nissim, Smith, Calibrating Noise to Sensitivity in Private Data Analysis, 2006.
    """

    scale: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", arguments.noise_scale("scale", self.scale))


@dataclasses.dataclass(frozen=True)
class DiscreteGaussian(Event, kind="discrete_gaussian"):
    """f(x) + discrete Gaussian noise, f one whole number that an example moves by at most `sensitivity`.

    The noise is a whole number z with probability proportional to exp(-z^2 / (2 sigma^2)), sigma = noise_multiplier *
    sensitivity [1, Definition 1]. Under add/remove and zero-out the mechanism is dominated by the pair of the law
    centred at 0 and at `sensitivity`, under replacement at 0 and at 2 * sensitivity; neighbours attain it.

    For vectors, compose ZCDP(1 / (2 * noise_multiplier**2)) instead, with noise_multiplier = sigma over the L2
    sensitivity [1, Theorem 14]: the vector's pair depends on its direction.

    Args:
        noise_multiplier: sigma over the sensitivity, >= 0, finite; 0 releases f(x) itself, and epsilon is infinite.
        sensitivity: an int >= 1, in grid units.

    References:
        [1] Canonne, Kamath, Steinke, The Discrete Gaussian for Differential Privacy, 2020. arXiv:2004.00010
    """

    noise_multiplier: float
    sensitivity: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", arguments.noise_scale("noise_multiplier", self.noise_multiplier))
        object.__setattr__(self, "sensitivity", _grid_units("sensitivity", self.sensitivity))


@dataclasses.dataclass(frozen=True)
class Skellam(Event, kind="skellam"):
    """f(x) + Skellam noise, f one whole number that an example moves by at most `sensitivity`.

    The noise is the difference of two Poisson counts of mean variance / 2 each; shares of it add up, as secure
    aggregation needs. Under add/remove and zero-out the mechanism is dominated by the pair of the law centred at 0
    and at `sensitivity`, under replacement at 0 and at 2 * sensitivity; neighbours attain it.

    For vectors, compose SkellamVector.

    Args:
        variance: of the noise, in grid units squared, >= 0, finite; 0 releases f(x) itself.
        sensitivity: an int >= 1, in grid units.

    References:
        Agarwal, Kairouz, Liu, The Skellam Mechanism for Differentially Private Federated Learning, 2021.
        arXiv:2110.04995
    """

    variance: float
    sensitivity: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "variance", _variance(self.variance))
        object.__setattr__(self, "sensitivity", _grid_units("sensitivity", self.sensitivity))


@dataclasses.dataclass(frozen=True)
class SkellamVector(Event, kind="skellam_vector"):
    """f(x) + independent Skellam noise in each coordinate, f a vector of whole numbers.

    Known by its Renyi curve only [1, Section 3]: at whole orders a > 1 the divergence is at most

        a l2^2 / (2 v) + min(((2 a - 1) l2^2 + 6 l1) / (4 v^2), 3 l1 / (2 v)).

    That holds under add/remove and zero-out; under replacement both sensitivities double. Sampling is refused.

    Args:
        variance: v, of each coordinate's noise, in grid units squared, >= 0, finite; 0 releases f(x) itself.
        l1_sensitivity: how far one example moves f in L1, > 0, in grid units.
        l2_sensitivity: how far in L2, > 0 and at most l1_sensitivity.

    Raises:
        ParameterError: a value is out of range, or l2_sensitivity is above l1_sensitivity.

    References:
        [1] Agarwal, Kairouz, Liu, The Skellam Mechanism for Differentially Private Federated Learning, 2021.
            arXiv:2110.04995
    """

    variance: float
    l1_sensitivity: float
    l2_sensitivity: float

    def __post_init__(self) -> None:
        remedy = "Give bounds in grid units with 0 < l2_sensitivity <= l1_sensitivity; for one number, use Skellam."
        l1 = arguments.non_negative("l1_sensitivity", self.l1_sensitivity, remedy=remedy)
        l2 = arguments.non_negative("l2_sensitivity", self.l2_sensitivity, remedy=remedy)
        if not 0 < l2 <= l1:
            raise ParameterError(f"l2_sensitivity must be in (0, l1_sensitivity = {l1!r}], got {l2!r}. {remedy}")
        object.__setattr__(self, "variance", _variance(self.variance))
        object.__setattr__(self, "l1_sensitivity", l1)
        object.__setattr__(self, "l2_sensitivity", l2)


@dataclasses.dataclass(frozen=True)
class RandomizedResponse(Event, kind="randomized_response"):
    """Each example answers one of k categories for itself: with probability p a uniform one, else the true one.

    The answers are independent and all are published. Whoever is absent, or zeroed out, must be made to answer too,
    uniformly at random; a list of answers that is shorter without them would give them away. Then:

        replace_one                 answers of two true categories: one is likelier by (1 - p + p / k) / (p / k)
        add_or_remove, zero_out     an answer of a true category against a uniform one

    Neighbours attain both. Poisson sampling, the rest absent, is itself randomized response: 1 - p shrinks by the
    rate.

    Args:
        p: probability of a uniform answer, in [0, 1]; 0 releases the truth, and epsilon is infinite.
        k: number of categories, an int >= 2.

    Raises:
        ParameterError: p is not in [0, 1], or k is not an int >= 2.

    References:
        Warner, Randomized Response: A Survey Technique for Eliminating Evasive Answer Bias, 1965.
    """

    p: float
    k: int = 2

    def __post_init__(self) -> None:
        remedy = "Give the probability of a uniformly random answer, for example 0.5."
        object.__setattr__(self, "p", arguments.probability("p", self.p, remedy=remedy))
        remedy = "Count the categories that can be answered, for example 2 for yes and no."
        k = arguments.whole("k", self.k, remedy=remedy)
        if k < 2:
            raise ParameterError(f"k must be >= 2, got {k}. {remedy}")
        object.__setattr__(self, "k", k)


def _variance(value: object) -> float:
    remedy = "Give the noise's variance in grid units squared, for example 100.0; 0 means no noise and no privacy."
    return arguments.non_negative("variance", value, remedy=remedy)


def _grid_units(name: str, value: object) -> int:
    remedy = "Give how many grid units one example moves the answer by, for example 1 for a count."
    return arguments.positive_whole(name, value, remedy=remedy)
