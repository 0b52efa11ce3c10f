"""What was released: frozen values that say which mechanism ran, never how it is accounted.

    Gaussian(noise_multiplier), Laplace(scale)          one noisy answer
    DiscreteGaussian, Skellam, SkellamVector            the same on a grid
    RandomizedResponse(p, k)                            one of k answers, sometimes at random
    EpsilonDelta(epsilon, delta), ZCDP(rho, xi)         any mechanism with that guarantee

    PoissonSampled(rate, event)                         on a random subset, each example drawn independently
    TruncatedPoissonSampled(rate, b, n, event)          the same, cut to at most b examples
    SampledWithoutReplacement(b, n, event)              on exactly b of n examples
    Shuffled(batches, event)                            one epoch, on each batch of a shuffled data set
    BallsInBins(bins, event)                            one epoch, each example in one batch at random

    MatrixFactorization(noise_multiplier, bands, steps, rate)    a whole run with noise correlated over steps
    Group(event, size)                                  seen by neighbours that differ in `size` units

    Repeated(event, count)                              count times, each with fresh randomness
    Composed(events)                                    one after another, each with fresh randomness
    RepeatAndSelect(event, mean, shape)                 the best of a random number of runs

`participation_sensitivity` says how far one example moves a matrix mechanism of another shape.

Every parameter is public: it must not have been chosen by looking at the private data (a schedule fixed in
advance is fine; "stop when epsilon hits 3" is not, that needs a privacy filter).

Example:
    >>> dpsgd = 1000 * PoissonSampled(0.01, Gaussian(1.0))
    >>> dpsgd
    Repeated(event=PoissonSampled(sample_rate=0.01, event=Gaussian(noise_multiplier=1.0)), count=1000)
    >>> Event.from_json(dpsgd.to_json()) == dpsgd
    True
"""

from accountants.events.allocation import BallsInBins
from accountants.events.black_box import ZCDP, EpsilonDelta
from accountants.events.event import Composed, Event, Repeated
from accountants.events.fixed_size import SampledWithoutReplacement, Shuffled
from accountants.events.group import Group
from accountants.events.matrix import MatrixFactorization, participation_sensitivity
from accountants.events.noise import (
    DiscreteGaussian,
    Gaussian,
    Laplace,
    RandomizedResponse,
    Skellam,
    SkellamVector,
)
from accountants.events.sampling import PoissonSampled, TruncatedPoissonSampled
from accountants.events.tuning import RepeatAndSelect

__all__ = [
    "ZCDP",
    "BallsInBins",
    "Composed",
    "DiscreteGaussian",
    "EpsilonDelta",
    "Event",
    "Gaussian",
    "Group",
    "Laplace",
    "MatrixFactorization",
    "PoissonSampled",
    "RandomizedResponse",
    "RepeatAndSelect",
    "Repeated",
    "SampledWithoutReplacement",
    "Shuffled",
    "Skellam",
    "SkellamVector",
    "TruncatedPoissonSampled",
    "participation_sensitivity",
]
