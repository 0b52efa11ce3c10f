"""Batches of a fixed size: drawn without replacement, or cut from a shuffled data set."""

from __future__ import annotations

import dataclasses

from accountants import arguments
from accountants.errors import ParameterError
from accountants.events.event import Event, require_event


@dataclasses.dataclass(frozen=True)
class SampledWithoutReplacement(Event, kind="sampled_without_replacement"):
    """`event`, run on a batch drawn uniformly among all of exactly batch_size examples.

    Worse than Poisson sampling at the same rate q = batch_size / dataset_size: an example in the batch keeps another
    out, so the sum moves by two clip norms.

    replace_one: given the rest of the batch, the answer has law A without the example, B with it and B' with its
    replacement, pairwise within two clip norms; with (P, Q) the noise at that distance, neighbours are dominated by
    the pair whose hockey-stick curve is H_a((1 - q) Q + q P || Q) for a >= 1 and H_a(P || (1 - q) P + q Q) below [1],
    by advanced joint convexity [2]. One step attains it, as ((1 - q) Q + q P, Q) or its reverse, where all others
    pull the opposite way; of several steps, those two are the lower bound.

    zero_out: a zeroed example is a replacement, so the same bound holds. add_or_remove: refused, because batch size
    and data set size are public.

    Args:
        batch_size: >= 1, at most dataset_size, public.
        dataset_size: the number of examples, public.
        event: un-sampled Gaussian or Laplace noise, what runs on each batch.

    Raises:
        ParameterError: a size that is not an int >= 1, a batch larger than the data set, or not an event.

    References:
        [1] Zhu, Dong, Wang, Optimal Accounting of Differential Privacy via Characteristic Function, 2022.
            arXiv:2106.08567
        [2] Balle, Barthe, Gaboardi, Privacy Amplification by Subsampling: Tight Analyses via Couplings and
            Divergences, 2018. arXiv:1807.01647
    """

    batch_size: int
    dataset_size: int
    event: Event

    def __post_init__(self) -> None:
        batch = arguments.positive_whole("batch_size", self.batch_size, remedy="Give the examples in each batch.")
        size = arguments.positive_whole("dataset_size", self.dataset_size, remedy="Give the number of examples.")
        if batch > size:
            raise ParameterError(
                f"batch_size must be at most dataset_size, got {batch} > {size}. "
                "A batch without replacement holds each example at most once."
            )
        object.__setattr__(self, "batch_size", batch)
        object.__setattr__(self, "dataset_size", size)
        require_event("SampledWithoutReplacement", self.event)


@dataclasses.dataclass(frozen=True)
class Shuffled(Event, kind="shuffled"):
    """One epoch over shuffled data: a random permutation cuts n places into batches, and `event` runs on each.

    Every example holds one of n public places and a removed example leaves its place empty, so add_or_remove means
    what zero_out means. Given the permutation each example is in exactly one batch: an epoch is one un-sampled
    `event`. That is the guarantee; a fresh shuffle is not claimed to amplify it, and Poisson sampling's numbers do
    not cover it. The lower bound has all others contribute nothing, so the shuffle hides the example's batch.

    For several epochs, each with a fresh shuffle or all with the same: `Shuffled(...) * epochs`.

    Args:
        batches_per_epoch: >= 1.
        event: un-sampled noise, what runs on each batch.
    """

    batches_per_epoch: int
    event: Event

    def __post_init__(self) -> None:
        batches = arguments.positive_whole(
            "batches_per_epoch", self.batches_per_epoch, remedy="Give ceil(n / batch_size)."
        )
        object.__setattr__(self, "batches_per_epoch", batches)
        require_event("Shuffled", self.event)
