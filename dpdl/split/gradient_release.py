"""Gradients at the cut as a release: what goes back to a feature holder, or from a label holder's head to the server.

    GradientRelease(max_norm=0.1, noise_multiplier=8.0)

The gradient of an example's loss with respect to its row tells its label: a glance at its norm or sign is an attack
[1]. Clipped and noised row by row, it is a Gaussian release of the label (and of whatever else it was computed from)
each time. As with activations, that is the whole claim only if the weights that it went through do not learn from
the same labels without noise: the steps of that part are composed with it (`PartTraining`). [2] privatises both.

Fewer assumptions and a better figure, where they fit: labels flipped once for ever (`MemoizedRandomizedResponse`).

References:
    [1] Li et al., Label Leakage and Protection in Two-party Split Learning, 2021. arXiv:2102.08504
    [2] Yang et al., Differentially Private Label Protection in Split Learning, 2022. arXiv:2203.02073
"""

from __future__ import annotations

from dataclasses import dataclass

from accountants import Event, Gaussian
from dpdl.split.row_noise import clipping_norm, noise_of_rows

__all__ = ["GradientRelease"]


@dataclass(frozen=True, kw_only=True)
class GradientRelease:
    """How gradients leave: clipped row by row and noised, at each step.

    Attributes:
        max_norm: C_d, largest L2 norm of the gradient with respect to one row, of a loss that is summed over rows.
        noise_multiplier: s, noise std over C_d; > 0.

    Guarantee:
        Each release of a row is `event`, to whoever receives it; steps of the part that it went through come on top.

    Raises:
        ParameterError: noise without clipping, or no noise.

    References:
        Li et al., 2021. arXiv:2102.08504; Yang et al., 2022. arXiv:2203.02073 (the module has both)
    """

    max_norm: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", clipping_norm("GradientRelease", self.max_norm))
        object.__setattr__(self, "noise_multiplier", noise_of_rows("GradientRelease", self.noise_multiplier))

    @property
    def event(self) -> Event:
        """One release of one row's gradient, under REPLACE_ONE."""
        return Gaussian(self.noise_multiplier)

    def __str__(self) -> str:
        return f"gradient rows clipped to {self.max_norm:g} with noise of {self.noise_multiplier:g} times that"
