"""The same answers computed on a random part of the examples, each drawn independently."""

from __future__ import annotations

import dataclasses

from accountants import arguments
from accountants.events.event import Event, require_event


@dataclasses.dataclass(frozen=True)
class PoissonSampled(Event, kind="poisson_sampled"):
    """`event` run on a random subset that holds each example independently with probability sample_rate.

    Not for shuffled or fixed-size batches: their privacy is worse, and this event's numbers do not cover them.
    With inner pair (A, B), B the data set with the example: dominated by ((1 - q) A + q B, A) for removal and its
    reverse for addition [1, Theorem 11]; the tight epsilon is the larger of the two compositions. Zeroing an example
    out is the same. Replacing one with additive noise A(m) around m: dominated by
    ((1 - q) A(0) + q A(1), (1 - q) A(0) + q A(-1)), the two examples pulling in opposite directions, and its reverse.

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


@dataclasses.dataclass(frozen=True)
class TruncatedPoissonSampled(Event, kind="truncated_poisson_sampled"):
    """Poisson sampling into batches of bounded size: of too many drawn, a uniform subset of max_batch_size is kept.

    Let J be how many of the *others* are drawn, a Binomial(at most n - 1, q) that no neighbour changes, and reveal
    whether J < b = max_batch_size.

        J < b     nothing is left out: PoissonSampled.
        J >= b    the example is in the batch with probability q b / (J + 1) <= q, and then takes the place of another.
                  With the rest of the batch and that other fixed and revealed, the sum moves by two clip norms:
                  PoissonSampled with shift 2 for adding or removing. Replacing the example, or zeroing it out (it is
                  still drawn, and takes its place), compares three laws pairwise within two clip norms, as
                  SampledWithoutReplacement does.

    Both cases' divergences, weighted by their probabilities, add up. Those of the second are not below those of the
    first, so a smaller data set is covered as well.

    Args:
        sample_rate: q in [0, 1].
        max_batch_size: b >= 1, public.
        dataset_size: n >= 1, public: the most examples that either neighbour holds.
        event: un-sampled Gaussian or Laplace noise, what runs on each batch.
    """

    sample_rate: float
    max_batch_size: int
    dataset_size: int
    event: Event

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_rate", arguments.sample_rate(self.sample_rate))
        batch = arguments.positive_whole(
            "max_batch_size", self.max_batch_size, remedy="Give the most examples that fit."
        )
        size = arguments.positive_whole(
            "dataset_size", self.dataset_size, remedy="Give a public bound on the examples."
        )
        object.__setattr__(self, "max_batch_size", batch)
        object.__setattr__(self, "dataset_size", size)
        require_event("TruncatedPoissonSampled", self.event)
