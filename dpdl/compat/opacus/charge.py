"""What a release of a facade run counts for."""

from __future__ import annotations

from dpdl.compat.opacus.accountants import IAccountant
from dpdl.compat.opacus.turn import Turn

__all__ = ["FixedCharge", "PoissonCharge"]


class PoissonCharge:
    """One Poisson-sampled Gaussian a release.

    Args:
        accountant: the engine's.
        sample_rate: each example's chance to be in a batch.
    """

    def __init__(self, accountant: IAccountant, sample_rate: float) -> None:
        self._accountant = accountant
        self._sample_rate = sample_rate

    def __call__(self, noise_multiplier: float) -> None:
        """A release with this noise is about to happen."""
        self._accountant.step(noise_multiplier=noise_multiplier, sample_rate=self._sample_rate)


class FixedCharge:
    """One Gaussian a pass over the data, in which each example is in at most one release.

    The releases of a pass are of disjoint examples: replacing one of them by nothing ("zero_out") changes one release,
    so that the pass is as private as that one (parallel composition). Which example is in which release must not
    depend on the data, and removing an example must not move the others to other releases: hence not "add or remove".
    If noise changes within a pass, it is charged again for the smaller.

    Args:
        accountant: the engine's.
        turn: knows the pass.
    """

    def __init__(self, accountant: IAccountant, turn: Turn) -> None:
        self._accountant = accountant
        self._turn = turn
        self._charged_pass = 0
        self._charged_noise = 0.0

    def __call__(self, noise_multiplier: float) -> None:
        """A release with this noise is about to happen."""
        if self._charged_pass == self._turn.passes and noise_multiplier >= self._charged_noise:
            return
        self._accountant.step(noise_multiplier=noise_multiplier, sample_rate=1.0)
        self._charged_pass, self._charged_noise = self._turn.passes, noise_multiplier
