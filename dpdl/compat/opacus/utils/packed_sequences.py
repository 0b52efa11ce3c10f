"""Packed sequences of random numbers, to try recurrent models on."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

__all__ = ["_gen_packed_data"]


def _gen_packed_data(
    minibatch_size: int, max_seq_length: int, input_dim: int, batch_first: bool, sorted_: bool | None = False
) -> PackedSequence:
    """Sequences of random lengths up to `max_seq_length`, which one of them has.

    Args:
        minibatch_size: how many.
        max_seq_length: positions of the longest.
        input_dim: numbers at each position.
        batch_first: taken for compatibility: a packed sequence has no order of axes.
        sorted_: whether they come from long to short.
    """
    lengths = [max_seq_length, *torch.randint(1, max_seq_length + 1, (minibatch_size - 1,)).tolist()]
    if sorted_:
        lengths.sort(reverse=True)
    return pack_sequence([torch.randn(n, input_dim) for n in lengths], enforce_sorted=bool(sorted_))
