"""How much privacy was spent: certified bounds on epsilon and delta, with numpy and scipy only.

    events        Gaussian, Laplace, PoissonSampled, Repeated, Composed; `event * n` repeats
    accountants   PRVAccountant (the default: certified, tight), RDPAccountant, GDPAccountant
    questions     epsilon, interval, delta, epsilon_curve, trade_off
    plans         noise_multiplier, steps

Every number that bounds privacy is an upper bound or one end of an Interval. All arguments are public.

Example:
    >>> import accountants
    >>> accountants.epsilon(noise_multiplier=1.1, sample_rate=256 / 60_000, steps=14_062, delta=1e-5) < 2.382
    True
"""

from accountants.accountant import Accountant, Interval
from accountants.errors import ParameterError, PrivacyError, UnsupportedEventError
from accountants.events import Composed, Event, Gaussian, Laplace, PoissonSampled, Repeated
from accountants.gdp_accountant import GDPAccountant
from accountants.prv_accountant import PRVAccountant
from accountants.queries import delta, dpsgd, epsilon, epsilon_curve, interval, new_accountant
from accountants.rdp_accountant import RDPAccountant, rdp
from accountants.relation import NeighboringRelation
from accountants.solvers import noise_multiplier, steps
from accountants.trade_off_curve import trade_off

__all__ = [
    "Accountant",
    "Composed",
    "Event",
    "GDPAccountant",
    "Gaussian",
    "Interval",
    "Laplace",
    "NeighboringRelation",
    "PRVAccountant",
    "ParameterError",
    "PoissonSampled",
    "PrivacyError",
    "RDPAccountant",
    "Repeated",
    "UnsupportedEventError",
    "delta",
    "dpsgd",
    "epsilon",
    "epsilon_curve",
    "interval",
    "new_accountant",
    "noise_multiplier",
    "rdp",
    "steps",
    "trade_off",
]
