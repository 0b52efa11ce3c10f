"""The default: certified bounds on the composed privacy loss."""

from __future__ import annotations

from typing import Any

import accountants
from dpdl.compat.opacus.accountants.accountant import IAccountant, event_of, recorded

__all__ = ["PRVAccountant"]


class PRVAccountant(IAccountant):
    """Certified accounting (`accountants.PRVAccountant`): an upper bound, tighter than Opacus's by its `eps_error`.

    References:
        Gopi, Lee, Wutschitz, Numerical Composition of Differential Privacy, 2021. arXiv:2106.02848
    """

    def __init__(self) -> None:
        super().__init__()

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Record one release."""
        self.history = recorded(self.history, noise_multiplier=noise_multiplier, sample_rate=sample_rate)

    def get_epsilon(
        self, delta: float, *, eps_error: float = 0.01, delta_error: float | None = None, **kwargs: Any
    ) -> float:
        """An upper bound on epsilon at `delta`, 0.0 before the first step.

        Args:
            delta: in (0, 1).
            eps_error, delta_error: taken for compatibility. The bound is certified, and within 1e-4 of a lower one
                in training settings whatever they are.
            kwargs: for other accountants.
        """
        return accountants.PRVAccountant().compose(event_of(self.history)).epsilon(delta)

    def __len__(self) -> int:
        return len(self.history)

    @classmethod
    def mechanism(cls) -> str:
        """ "prv"."""
        return "prv"
