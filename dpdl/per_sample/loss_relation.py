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

    None if they are all zero, which says nothing.
    """
    holds = _equal_after(whole, part, [size / part_size, 1.0])
    if holds is None:
        return None
    return "mean" if holds[0] else "sum" if holds[1] else "neither"


def agree(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool | None:
    """Whether gradients are the same; None if they are all zero."""
    holds = _equal_after(one, other, [1.0])
    return None if holds is None else holds[0]


def _equal_after(whole: Sequence[Tensor], part: Sequence[Tensor], factors: list[float]) -> list[bool] | None:
    """Whether `part` is `whole` times each factor; None if all is zero."""
    squares, distances, all_zero = 0.0, [0.0] * len(factors), True
    for a, b in _blocks(whole, part):
        all_zero = all_zero and not bool(a.any()) and not bool(b.any())
        squares += float(b.square().sum())
        for i, factor in enumerate(factors):
            distances[i] += float((a * factor - b).square().sum())
    if all_zero:
        return None
    tolerance = max(TOLERANCE, *(ROUNDINGS * torch.finfo(g.dtype).eps for g in part))
    return [distance**0.5 <= tolerance * squares**0.5 for distance in distances]


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
