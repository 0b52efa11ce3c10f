"""The same answers computed on a random part of the examples."""

from __future__ import annotations

import dataclasses

from accountants import arguments
from accountants.events.event import Event, require_event


@dataclasses.dataclass(frozen=True)
class PoissonSampled(Event, kind="poisson_sampled"):
    """`event` run on a random subset that holds each example independently with probability sample_rate.

    Not for shuffled or fixed-size batches: their privacy is worse, and this event's numbers do not cover them.
    With inner pair (A, B), B the data set with the example: dominated by ((1 - q) A + q B, A) for removal and its
    reverse for addition [1, Theorem 11]; the tight epsilon is the larger of the two compositions.

    Args:
        sample_rate: q in [0, 1]; 0 releases nothing about any example, 1 is `event` itself.
        event: what runs on each subset.

    References:
        [1] Zhu, Dong, Wang, Optimal Accounting of Differential Privacy via Characteristic Function, 2022.
            arXiv:2106.08567
    """

    sample_rate: float
    event: Event

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_rate", arguments.sample_rate(self.sample_rate))
        require_event("PoissonSampled", self.event)
