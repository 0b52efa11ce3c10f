"""How much privacy was spent: certified bounds on epsilon and delta, with numpy and scipy only.

    events        Gaussian, Laplace, PoissonSampled, ...; `event * n` repeats, `a + b` composes
    accountants   PRVAccountant (the default: certified, tight), RDPAccountant, ZCDPAccountant, GDPAccountant
    questions     epsilon, interval, delta, epsilon_curve
    plans         noise_multiplier, steps, sample_rate
    meaning       trade_off, advantage, tpr_at_fpr, positive_predictive_value, bayes_accuracy, posterior,
                  reconstruction, compare
    adaptive      PrivacyFilter, PrivacyOdometer, IndividualAccountant

Every number that bounds privacy is an upper bound or one end of an Interval; what is neither is an Estimate, and says
so. All arguments are public.

Example:
    >>> import accountants
    >>> accountants.epsilon(noise_multiplier=1.1, sample_rate=256 / 60_000, steps=14_062, delta=1e-5) < 2.382
    True
"""

from accountants.accountant import Accountant
from accountants.adaptive.filters import PrivacyFilter
from accountants.adaptive.individual import IndividualAccountant
from accountants.adaptive.odometer import PrivacyOdometer
from accountants.errors import ParameterError, PrivacyError, UnsupportedEventError
from accountants.estimate import Estimate
from accountants.events import (
    ZCDP,
    BallsInBins,
    Composed,
    DiscreteGaussian,
    EpsilonDelta,
    Event,
    Gaussian,
    Group,
    Laplace,
    MatrixFactorization,
    PoissonSampled,
    RandomizedResponse,
    RepeatAndSelect,
    Repeated,
    SampledWithoutReplacement,
    Shuffled,
    Skellam,
    SkellamVector,
    TruncatedPoissonSampled,
    participation_sensitivity,
)
from accountants.gdp_accountant import GDPAccountant
from accountants.interval import Interval
from accountants.meaning.attacks import (
    advantage,
    bayes_accuracy,
    positive_predictive_value,
    posterior,
    reconstruction,
    tpr_at_fpr,
)
from accountants.meaning.comparison import Comparison, compare
from accountants.meaning.trade_off_curve import trade_off
from accountants.prv_accountant import PRVAccountant
from accountants.queries import delta, dpsgd, epsilon, epsilon_curve, interval, new_accountant
from accountants.rdp_accountant import RDPAccountant, rdp
from accountants.relation import NeighboringRelation
from accountants.solvers import noise_multiplier, sample_rate, steps
from accountants.tuning import Repetitions
from accountants.zcdp_accountant import ZCDPAccountant

__all__ = [
    "ZCDP",
    "Accountant",
    "BallsInBins",
    "Comparison",
    "Composed",
    "DiscreteGaussian",
    "EpsilonDelta",
    "Estimate",
    "Event",
    "GDPAccountant",
    "Gaussian",
    "Group",
    "IndividualAccountant",
    "Interval",
    "Laplace",
    "MatrixFactorization",
    "NeighboringRelation",
    "PRVAccountant",
    "ParameterError",
    "PoissonSampled",
    "PrivacyError",
    "PrivacyFilter",
    "PrivacyOdometer",
    "RDPAccountant",
    "RandomizedResponse",
    "RepeatAndSelect",
    "Repeated",
    "Repetitions",
    "SampledWithoutReplacement",
    "Shuffled",
    "Skellam",
    "SkellamVector",
    "TruncatedPoissonSampled",
    "UnsupportedEventError",
    "ZCDPAccountant",
    "advantage",
    "bayes_accuracy",
    "compare",
    "delta",
    "dpsgd",
    "epsilon",
    "epsilon_curve",
    "interval",
    "new_accountant",
    "noise_multiplier",
    "participation_sensitivity",
    "positive_predictive_value",
    "posterior",
    "rdp",
    "reconstruction",
    "sample_rate",
    "steps",
    "tpr_at_fpr",
    "trade_off",
]
