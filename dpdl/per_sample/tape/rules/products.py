"""Sums of outer products: what every contraction of data with a weight leaves behind.

Axes: n example, s shared (a batch of weights), t position, i input, o output. The gradient of example n is

    G[n, s, o, i] = sum_t g[n, s, t, o] a[n, s, t, i]

with a the operand and g the gradient of the output. Three exact ways to its norm and to sum_n w_n G[n]:

- one position: |G[n, s]| = |g| |a|; the weighted sum is one matrix product.                         [1]
- Gram: |G[n, s]|^2 = sum_tu (a a^T)[t, u] (g g^T)[t, u]; the weighted sum is one matrix product.    [2]
- materialised: G by a batched matrix product, kept for the weighted sum.

References:
    [1] Goodfellow, Efficient Per-Example Gradient Computations, 2015. arXiv:1510.01799
    [2] Li, Tramer, Liang, Hashimoto, Large Language Models Can Be Strong Differentially Private Learners, ICLR 2022,
        section 4 (ghost clipping); Bu et al., Differentially Private Optimization on Large Model at Small Cost, 2022
        (book-keeping: contract again instead of a second backward pass). arXiv:2110.05679, arXiv:2210.00038
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpdl.per_sample.squared_norms import squared_norms
from dpdl.per_sample.tape.contribution import Contribution

__all__ = ["Arrangement", "OuterProducts", "SharedGram", "gram_is_cheaper"]

# Cost model, measured by `python -m benchmarks.product_rules` on one core of an AMD EPYC: multiply-adds a second in
# batched products, numbers moved a second. Only their ratio matters, and it is much the same elsewhere.
MULTIPLY_ADDS = 4.0e10
NUMBERS_MOVED = 2.4e9
NUMBERS_MOVED_UNCACHED = 1.2e9
CACHED_NUMBERS = 8e6
# A Gram norm is a difference of large numbers where an example's positions cancel. Its rounding error is at most a
# few units of (sum_t |a_t| |g_t|)^2; that much is added, so that the norm does not fall below the truth.
GRAM_MARGIN = 4.0
INNER_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How [s, o, i] is arranged in the weight.

    Attributes:
        shape: sizes of the axes that s, o and i consist of, in that order.
        order: the weight is that, permuted by this.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]

    def of_weight(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """`tensor`, [*leading, s, o, i], in the shape of the weight."""
        lead = tensor.shape[:leading]
        shaped = tensor.reshape(*lead, *self.shape)
        if self.order == tuple(range(len(self.order))):
            return shaped
        return shaped.permute(*range(leading), *(leading + axis for axis in self.order))


def gram_matrices(x: Tensor) -> Tensor:
    """x x^T for each [t, i] of a batch, [., t, t].

    In blocks of the inner axis: a kernel adds an inner product's terms one after another, and over 50,000 equal float32
    numbers was seen 7e-5 too small.
    """
    first, *rest = x.split(INNER_BLOCK, dim=2)
    total = torch.bmm(first, first.mT)
    for block in rest:
        total = total.baddbmm_(block, block.mT)
    return total


class SharedGram:
    """The Gram matrices of one gradient g that several weights of one operation have in common, computed once.

    Args:
        users: how many weights.
    """

    def __init__(self, users: int) -> None:
        self.users = users
        self._gram: Tensor | None = None

    def of(self, g: Tensor) -> Tensor:
        """[n * s, t, t]."""
        if self._gram is None:
            self._gram = gram_matrices(g)
        return self._gram


class OuterProducts(Contribution):
    """Per-sample gradients as sums of outer products over positions.

    Args:
        a: operand, [n, s, t, i].
        g: gradient of the output, [n, s, t, o].
        arrangement: from [s, o, i] to the weight.
        keeps_operands: never give up a and g for materialised gradients.
        shared: where g serves other weights too.
    """

    def __init__(
        self,
        a: Tensor,
        g: Tensor,
        arrangement: Arrangement,
        *,
        keeps_operands: bool = False,
        shared: SharedGram | None = None,
    ) -> None:
        self._shared = shared or SharedGram(1)
        self._keeps_operands = keeps_operands
        self.a: Tensor | None = a
        self.g: Tensor | None = g
        self.arrangement = arrangement
        self._sizes = (*a.shape[:3], a.shape[3], g.shape[3])  # n, s, t, i, o
        self._gradients: Tensor | None = None  # [n, s, o, i]

    def _norms_squared(self) -> Tensor:
        n, s, t, i, o = self._sizes
        if self.a is None or self.g is None:
            return squared_norms(self._materialized())
        if t == 0:
            return self.a.new_zeros(n)
        if t == 1:
            products = squared_norms(self.a.reshape(n * s, i)).mul_(squared_norms(self.g.reshape(n * s, o)))
            return products if s == 1 else products.view(n, s).sum(1)
        if self._keeps_operands or gram_is_cheaper(self._sizes, self._shared.users):
            return self._gram_norms(self.a.reshape(n * s, t, i), self.g.reshape(n * s, t, o)).view(n, s).sum(1)
        self.give_up_operands()
        return squared_norms(self._materialized())

    def give_up_operands(self) -> None:
        """Materialise the gradients, and go on with them alone."""
        self._gradients = self._materialized()
        self.a = self.g = None

    def _gram_norms(self, a: Tensor, g: Tensor) -> Tensor:
        """[n * s]."""
        gram_a, gram_g = gram_matrices(a), self._shared.of(g)
        lengths = (gram_a.diagonal(dim1=1, dim2=2) * gram_g.diagonal(dim1=1, dim2=2)).clamp_min(0).sqrt().sum(1)
        squares = gram_a.mul_(gram_g).sum((1, 2))
        return squares.clamp_min(0).add_(lengths.square_(), alpha=GRAM_MARGIN * torch.finfo(a.dtype).eps)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See `Contribution`."""
        n, s, t, i, o = self._sizes
        weights = weights.to(self._dtype)
        if self.a is None or self.g is None:
            total = torch.mv(self._materialized().view(n, -1).t(), weights).view(s, o, i)
        elif s == t == 1:
            a, g, factors = self.a.reshape(n, i), self.g.reshape(n, o), weights.unsqueeze(1)
            total = torch.mm(g.t(), a * factors) if i < o else torch.mm((g * factors).t(), a)
        else:
            a, g, factors = self.a, self.g, weights.view(n, 1, 1, 1)
            a, g = (a * factors, g) if i < o else (a, g * factors)
            if s == 1:
                if not g.is_contiguous():  # positions first, as in recurrent layers: sum in that order, without a copy
                    a, g = a.transpose(0, 2), g.transpose(0, 2)
                total = torch.mm(g.reshape(n * t, o).t(), a.reshape(n * t, i)).unsqueeze(0)
            else:
                rows_g, rows_a = (x.transpose(0, 1).reshape(s, n * t, -1) for x in (g, a))
                total = torch.bmm(rows_g.mT, rows_a)
        return self.arrangement.of_weight(total)

    def materialize(self) -> Tensor:
        """See `Contribution`."""
        return self.arrangement.of_weight(self._materialized(), leading=1)

    def _materialized(self) -> Tensor:
        if self._gradients is not None:
            return self._gradients
        assert self.a is not None
        assert self.g is not None
        n, s, t, i, o = self._sizes
        return torch.bmm(self.g.reshape(n * s, t, o).mT, self.a.reshape(n * s, t, i)).view(n, s, o, i)

    @property
    def _dtype(self) -> torch.dtype:
        kept = self._gradients if self.a is None else self.a
        assert kept is not None
        return kept.dtype

    def rows(self, index: Tensor) -> OuterProducts:
        """See `Contribution`."""
        return self._with([None if x is None else x[index] for x in (self.a, self.g, self._gradients)], len(index))

    def double(self) -> OuterProducts:
        """See `Contribution`."""
        doubled = [None if x is None else x.double() for x in (self.a, self.g, self._gradients)]
        return self._with(doubled, self._sizes[0])

    def _with(self, tensors: list[Tensor | None], examples: int) -> OuterProducts:
        other = object.__new__(OuterProducts)
        other.a, other.g, other._gradients = tensors
        other.arrangement = self.arrangement
        other._keeps_operands = self._keeps_operands
        other._sizes = (examples, *self._sizes[1:])
        other._shared = SharedGram(1)
        return other

    def keeping_operands(self) -> OuterProducts:
        """The same, with a and g at hand whatever is asked of it."""
        assert self.a is not None
        assert self.g is not None
        return OuterProducts(self.a, self.g, self.arrangement, keeps_operands=True)

    def joined(self, others: Sequence[Contribution]) -> Contribution | None:
        """Along positions: the same weight used again."""
        parts = [self]
        for other in others:
            if not isinstance(other, OuterProducts) or other.arrangement != self.arrangement:
                return None
            parts.append(other)
        operands = [part.a for part in parts if part.a is not None]
        cotangents = [part.g for part in parts if part.g is not None]
        if len(operands) < len(parts):
            return None
        return OuterProducts(torch.cat(operands, 2), torch.cat(cotangents, 2), self.arrangement)


def gram_is_cheaper(sizes: tuple[int, ...], users: int = 1) -> bool:
    """Whether the Gram form of (n, s, t, i, o) takes less time than materialising, norms and weighted sum together.

    `users` weights share the Gram matrices of g.
    """
    n, s, t, i, o = sizes
    # Written once, read for the norm, read for the weighted sum. The products themselves cost the same both ways.
    gradients = n * s * i * o
    materialised = 3 * gradients / (NUMBERS_MOVED if gradients < CACHED_NUMBERS else NUMBERS_MOVED_UNCACHED)
    gram = n * s * t * (t * ((i + o / users) / MULTIPLY_ADDS + 4 / NUMBERS_MOVED) + min(i, o) / NUMBERS_MOVED)
    return gram < materialised
