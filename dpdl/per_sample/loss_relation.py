"""Whether a loss is a mean or a sum over examples, from its gradients for a batch and for other examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Verdict", "agree", "relation_of"]

# Relative difference of gradients that still counts as equal, and the same in roundings of their dtype,
# whichever is more (half precision). A mean over half of the batch is off by 1.5 at least.
TOLERANCE = 1e-3
ROUNDINGS = 8

# Gradients beyond this belong to examples that are about to be left out; their squares would overflow.
LARGEST = 1e100

# Numbers compared at once, in float64: what a core's caches hold. Outputs may be as large as the model's memory.
BLOCK = 2**16

Verdict = Literal["mean", "sum", "neither"]


def relation_of(whole: Sequence[Tensor], part: Sequence[Tensor], *, size: int, part_size: int) -> Verdict | None:
    """How output gradients of the same examples, among `size` and among `part_size` examples, are related.

    None if they are all zero, or so small that rounding leaves nothing of them: that says nothing.
    """
    holds = _equal_after(whole, part, [size / part_size, 1.0])
    if holds is None:
        return None
    return "mean" if holds[0] else "sum" if holds[1] else "neither"


def agree(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool | None:
    """Whether gradients are the same; None if they are all zero, or as good as zero."""
    holds = _equal_after(one, other, [1.0])
    return None if holds is None else holds[0]


def _equal_after(whole: Sequence[Tensor], part: Sequence[Tensor], factors: list[float]) -> list[bool] | None:
    """Whether `part` is `whole` times each factor; None if all is zero, or too small to be told from zero."""
    squares, distances, largest, count = 0.0, [0.0] * len(factors), 0.0, 0
    for a, b in _blocks(whole, part):
        squares += float(b.square().sum())
        largest = max(largest, *(float(x.abs().max()) for x in (a, b) if x.numel()), 0.0)
        count += b.numel()
        for i, factor in enumerate(factors):
            distances[i] += float((a * factor - b).square().sum())
    tolerance = max(TOLERANCE, *(ROUNDINGS * torch.finfo(g.dtype).eps for g in part))
    # Numbers near the smallest of their dtype are rounded to its multiples, however small they are: a saturated
    # softmax has such gradients. The larger side is compared, so that a gradient which comes out of nothing is seen.
    spacing = max(_spacing(g.dtype) for g in (*whole, *part))
    if tolerance * largest <= ROUNDINGS * max(factors) * spacing * count**0.5:
        return None
    return [distance**0.5 <= tolerance * squares**0.5 for distance in distances]


def _spacing(dtype: torch.dtype) -> float:
    """The smallest number of a dtype above zero."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _blocks(whole: Sequence[Tensor], part: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The numbers of both, a few at a time, without those that are too large."""
    for a, b in zip(whole, part, strict=True):
        for some, same in zip(_numbers(a).split(BLOCK), _numbers(b).split(BLOCK), strict=True):
            x, y = some.double(), same.double()
            known = (x.abs() < LARGEST) & (y.abs() < LARGEST)  # not so for NaN either
            yield (x, y) if bool(known.all()) else (x[known], y[known])


def _numbers(gradient: Tensor) -> Tensor:
    """[.], a complex number being two."""
    return (torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient).reshape(-1)
