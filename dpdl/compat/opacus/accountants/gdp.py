"""Gaussian differential privacy: an estimate, not a bound, wherever batches are sampled."""

from __future__ import annotations

import warnings
from typing import Any

import accountants
from dpdl.compat.opacus.accountants.accountant import IAccountant, event_of, recorded
from dpdl.errors import ParameterError, PrivacyWarning

__all__ = ["GaussianAccountant"]


class GaussianAccountant(IAccountant):
    """The central-limit estimate of `accountants.GDPAccountant`; its epsilon is an `accountants.Estimate`.

    References:
        Bu, Dong, Long, Su, Deep Learning with Gaussian Differential Privacy, 2020. arXiv:1911.11607
    """

    def __init__(self) -> None:
        warnings.warn(
            "GDP accounting of sampled batches is an estimate that can be far below the truth (docs/accounting.md). "
            'For a bound use accountant="prv", the default.',
            PrivacyWarning,
            stacklevel=2,
        )
        super().__init__()

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Record one release.

        Raises:
            ParameterError: the noise or the rate is another than before.
        """
        if self.history and self.history[-1][:2] != (noise_multiplier, sample_rate):
            raise ParameterError(
                f"GaussianAccountant takes one noise multiplier and one sample rate, had {self.history[-1][:2]} and "
                f'got {(noise_multiplier, sample_rate)}. Use accountant="prv" for runs that change them.'
            )
        self.history = recorded(self.history, noise_multiplier=noise_multiplier, sample_rate=sample_rate)

    def get_epsilon(self, delta: float, poisson: bool = True, **kwargs: Any) -> float:
        """An estimate of epsilon at `delta`; a bound only where no batch was sampled.

        Args:
            delta: at which epsilon is asked for.
            poisson: must stay True.

        Raises:
            ParameterError: `poisson=False`, of which nothing is claimed here.
        """
        if not poisson:
            raise ParameterError(
                "poisson=False asks for an estimate for uniformly drawn batches, which has no proof. A run with "
                "poisson_sampling=False is recorded with sample rate 1; ask for its epsilon without this argument."
            )
        return accountants.GDPAccountant().compose(event_of(self.history)).epsilon(delta)

    def __len__(self) -> int:
        return len(self.history)

    @classmethod
    def mechanism(cls) -> str:
        """ "gdp"."""
        return "gdp"
