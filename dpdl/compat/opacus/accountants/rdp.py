"""Renyi accounting at fixed orders, as Opacus does it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from accountants import arguments, rdp
from dpdl.compat.opacus.accountants.accountant import IAccountant, event_of, recorded

__all__ = ["RDPAccountant"]


class RDPAccountant(IAccountant):
    """Renyi accounting; `accountants.RDPAccountant`, whose order is continuous, gives a slightly smaller upper bound.

    References:
        Mironov, Talwar, Zhang, Renyi Differential Privacy of the Sampled Gaussian Mechanism, 2019. arXiv:1908.10530
    """

    DEFAULT_ALPHAS: Sequence[float] = [1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64))

    def __init__(self) -> None:
        super().__init__()

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Record one release."""
        self.history = recorded(self.history, noise_multiplier=noise_multiplier, sample_rate=sample_rate)

    def get_privacy_spent(self, *, delta: float, alphas: Sequence[float] | None = None) -> tuple[float, float]:
        """The least epsilon over the orders, and the order that gives it.

            epsilon = R(a) + log(1 - 1/a) - (log delta + log a) / (a - 1)

        (Canonne, Kamath, Steinke 2020, arXiv:2004.00010, Proposition 12).

        Args:
            delta: in (0, 1).
            alphas: orders > 1.

        Returns:
            (epsilon, order); (0, 0) before the first step.
        """
        delta = arguments.delta(delta)
        if not self.history:
            return 0.0, 0.0
        order = np.asarray(self.DEFAULT_ALPHAS if alphas is None else alphas, dtype=float)
        spent = rdp(event_of(self.history), order)
        epsilons = spent + np.log1p(-1 / order) - (math.log(delta) + np.log(order)) / (order - 1)
        best = int(np.argmin(epsilons))
        return max(0.0, float(epsilons[best])), float(order[best])

    def get_epsilon(self, delta: float, alphas: Sequence[float] | None = None, **kwargs: Any) -> float:
        """An upper bound on epsilon at `delta`; other keywords are for other accountants.

        Args:
            delta: in (0, 1).
            alphas: Renyi orders > 1; by default many.
        """
        return self.get_privacy_spent(delta=delta, alphas=alphas)[0]

    def __len__(self) -> int:
        return len(self.history)

    @classmethod
    def mechanism(cls) -> str:
        """ "rdp"."""
        return "rdp"
