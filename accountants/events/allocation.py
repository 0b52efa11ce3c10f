"""Each example goes to one batch of the epoch, at random."""

from __future__ import annotations

import dataclasses

from accountants import arguments
from accountants.events.event import Event, require_event


@dataclasses.dataclass(frozen=True)
class BallsInBins(Event, kind="balls_in_bins"):
    """One epoch: each example goes to one of `bins` batches, independently and uniformly; `event` runs on each batch.

    As easy to run as a shuffle, and amplified nearly as Poisson sampling at rate 1 / bins is [1, 2]. Adding, removing
    or zeroing an example is dominated, and attained, by

        P = (1 / T) sum_i N(e_i, s^2 I),    Q = N(0, s^2 I)    in T = bins dimensions,

    because others' bins may be revealed and a step's answer can be made from one coordinate. Bounds come from exact
    Renyi moments and from a numerical law that encloses the likelihood ratio in the convex order.

    Replacing an example, and groups: given its bin, an example is in one un-sampled `event`, at two clip norms for a
    replacement; no amplification is claimed.

    For several epochs, with fresh bins for each: `BallsInBins(...) * epochs`.

    Args:
        bins: T >= 1, batches in an epoch.
        event: un-sampled Gaussian noise, what runs on each batch.

    References:
        [1] Chua et al., Balls-and-Bins Sampling for DP-SGD, 2024. arXiv:2412.16802
        [2] Feldman, Shenfeld, Privacy Amplification by Random Allocation, 2025. arXiv:2502.08202
    """

    bins: int
    event: Event

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "bins", arguments.positive_whole("bins", self.bins, remedy="Give the batches in one epoch.")
        )
        require_event("BallsInBins", self.event)
