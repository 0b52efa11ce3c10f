"""What is released at the cut: activations, row by row, each step anew or once for ever.

    CutRelease(max_norm=1.0, noise_multiplier=4.0)                          # each step, fresh noise
    CutRelease(max_norm=1.0, noise_multiplier=4.0, mode="release_once")     # a frozen public encoder, each row once

What an honest claim against who receives the rows is made of:

- **per_step, frozen part.** A row that was released T times: T Gaussian releases, mu = 2 sqrt(T) / s.
- **per_step, trained part.** A row moves the weights, and through them every later row of *every* example: the claim is
  the T row releases and the T noisy steps of the part, the latter without amplification by sampling, since the receiver
  sees which rows take part. If those steps have no noise there is no finite bound.
- **release_once.** The part is frozen and its weights know nothing of the private rows; each row is noised once, and
  kept (`RowCache`). One release, whatever the receiver does with it and for how long: all that is post-processing.

Sources: [1] clips and noises rows of a frozen bottom model; [2] is the case against noise without clipping.

References:
    [1] Pham et al., Enhancing Accuracy-Privacy Trade-off in Differentially Private Split Learning, 2023.
        arXiv:2310.14434
    [2] Titcombe et al., Practical Defences Against Model Inversion Attacks for Split Neural Networks, 2021.
        arXiv:2104.05743
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from accountants import Event, Gaussian
from dpdl.errors import ParameterError
from dpdl.split.row_noise import clipping_norm, noise_of_rows

__all__ = ["CutMode", "CutRelease"]

CutMode = Literal["per_step", "release_once"]


@dataclass(frozen=True, kw_only=True)
class CutRelease:
    """How activations leave: clipped row by row, noised, each step or once.

    Attributes:
        max_norm: C_z, largest L2 norm of one row, over all of its axes.
        noise_multiplier: s, noise std over C_z; > 0.
        mode: "per_step", or "release_once".

    Guarantee:
        Each release of a row is `event`, to whoever receives it. The module says what a run of them adds up to.

    Raises:
        ParameterError: noise without clipping, no noise, or an unknown mode.

    References:
        Pham et al., 2023. arXiv:2310.14434; Titcombe et al., 2021. arXiv:2104.05743 (the module has both)
    """

    max_norm: float
    noise_multiplier: float
    mode: CutMode = "per_step"

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", clipping_norm("CutRelease", self.max_norm))
        object.__setattr__(self, "noise_multiplier", noise_of_rows("CutRelease", self.noise_multiplier))
        if self.mode not in get_args(CutMode):
            raise ParameterError(f"mode must be one of {list(get_args(CutMode))}, got {self.mode!r}.")

    @property
    def event(self) -> Event:
        """One release of one row, under REPLACE_ONE, which doubles the norm itself (`dpdl.split.row_noise`)."""
        return Gaussian(self.noise_multiplier)

    def __str__(self) -> str:
        when = "at each step" if self.mode == "per_step" else "once, from a frozen public encoder"
        return f"rows clipped to {self.max_norm:g} with noise of {self.noise_multiplier:g} times that, {when}"
