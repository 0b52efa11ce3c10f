from __future__ import annotations

from accountants import gaussian, rdp_accountant as rdp
from accountants.accountant import Accountant, Interval
from accountants.normal_form import NormalForm


class PRVAccountant(Accountant):
    """Interim: closed form where Gaussian, Renyi upper bound elsewhere."""

    def _epsilon_interval(self, form: NormalForm, delta: float) -> Interval:
        mu = form.gaussian_mu
        return Interval(0.0, rdp.epsilon_upper(form, delta)) if mu is None else Interval(*gaussian.epsilon_bounds(mu, delta))

    def _delta_interval(self, form: NormalForm, epsilon: float) -> Interval:
        mu = form.gaussian_mu
        return Interval(0.0, rdp.delta_upper(form, epsilon)) if mu is None else Interval(*gaussian.delta_bounds(mu, epsilon))
