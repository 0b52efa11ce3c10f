"""Poisson sampling: every example joins a batch by its own coin, exactly as the accountant assumes.

    sampler = PoissonSampler(dataset_size=60_000, sample_rate=512 / 60_000, stream=stream)
    indices = sampler.draw(step)                     # empty batches happen, and are steps too

The coin is integer arithmetic on cryptographic words: an example is in when its 64-bit word is
below floor(q 2^64). The probability is floor(q 2^64) / 2^64, never above the rate q that is
accounted, and amplification by sampling only grows weaker as q grows.

Only as many bits as needed are drawn. The word's upper 16 bits decide all but one example in
65,536; for those whose upper bits equal the threshold's, the lower 48 are drawn from a second stream.
Comparing two numbers digit by digit is comparing them, so the distribution is the same,
at a quarter of the keystream.

Public: the dataset size (under add-or-remove it is a property of the data: treat what is
passed as published), the rate. Private: which examples were drawn, and how many.

References:
    Mironov, Talwar and Zhang, Renyi Differential Privacy of the Sampled Gaussian Mechanism, 2019.
    arXiv:1908.10530, section 3.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dpdl.errors import ParameterError
from dpdl.secure_random import RandomStream

__all__ = ["PoissonSampler"]

_LOW_BITS = 48
_HIGHS_PER_WORD = 4  # 16 bits each
_CHUNK = 1 << 22  # examples decided at once, a multiple of 4: 8 MiB of upper digits


class PoissonSampler:
    """Draws each logical batch by independent coins.

    Args:
        dataset_size: n >= 0, examples.
        sample_rate: q in [0, 1], each example's probability of being in a batch.
        stream: source of randomness, used for nothing but sampling.

    Guarantee:
        Every index is in `draw(step)` with probability floor(q 2^64) / 2^64 <= q (q = 0: never,
        q = 1: always), independently of the other indices and steps.

    Raises:
        ParameterError: dataset_size is negative, or sample_rate outside [0, 1].

    Example:
        >>> sampler = PoissonSampler(20, 0.25, RandomStream.from_insecure_seed(7))
        >>> sampler.draw(0), sampler.draw(1)
        (array([ 2,  3,  5,  6, 11, 12, 15, 16, 18]), array([ 2,  4, 17]))

    References:
        Mironov, Talwar and Zhang, 2019 (the module has it). arXiv:1908.10530, section 3.
    """

    def __init__(self, dataset_size: int, sample_rate: float, stream: RandomStream) -> None:
        if dataset_size < 0:
            raise ParameterError(f"dataset_size must be >= 0, got {dataset_size}.")
        if not 0 <= sample_rate <= 1:
            raise ParameterError(f"sample_rate must be in [0, 1], got {sample_rate}.")
        self.dataset_size = dataset_size
        self.sample_rate = sample_rate
        self._threshold = int(math.ldexp(sample_rate, 64))  # exact: scaling by 2^64 does not round
        self._high = stream.child("high")
        self._low = stream.child("low")

    def draw(self, step: int) -> NDArray[np.int64]:
        """The logical batch of a step; the same step gives the same batch.

        Args:
            step: the logical step, >= 0.

        Returns:
            Indices into the dataset, ascending, shape [examples drawn], possibly empty. The
            order is free: the release is the noisy sum over the batch, which no order changes, and
            ascending reads a dataset on disk forwards. Never publish the indices.
        """
        # At q = 1 the upper digit is 2^16, which is above every 16 bits: all are in.
        high_threshold, low_threshold = divmod(self._threshold, 2**_LOW_BITS)
        drawn = [np.empty(0, dtype=np.int64)]
        ties_before = 0
        for begin in range(0, self.dataset_size, _CHUNK):
            high = self._high_digits(step, begin, min(_CHUNK, self.dataset_size - begin))
            included = high < high_threshold
            ties = np.flatnonzero(high == high_threshold)
            low = self._low.words(len(ties), message=step, start=ties_before) >> np.uint64(64 - _LOW_BITS)
            included[ties] = low < low_threshold
            ties_before += len(ties)
            drawn.append(np.flatnonzero(included) + begin)
        return np.concatenate(drawn)

    def _high_digits(self, step: int, begin: int, count: int) -> NDArray[np.uint16]:
        """The upper 16 bits of the words of examples begin, ..., begin + count - 1, shape [count]."""
        words = self._high.words(-(-count // _HIGHS_PER_WORD), message=step, start=begin // _HIGHS_PER_WORD)
        return words.view(np.uint16)[:count]
