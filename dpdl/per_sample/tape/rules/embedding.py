"""Looking rows up in a table, without ever forming a table for each example.

Axes: n example, t lookup, d width, v row of the table. Gradient of example n: row v receives the sum of g[n, t] over
the lookups t that ask for v. Lookups of one example for one row are added up first: what is left is squared for
the norm, and added to the table's rows for the weighted sum.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpdl.per_sample.tape.contribution import Contribution
from dpdl.per_sample.tape.rules.products import Arrangement, OuterProducts
from dpdl.per_sample.tape.rules.rule import Rule, RuleCall
from dpdl.per_sample.tape.source import Source

__all__ = ["RULES", "Lookups"]


class Lookups(Contribution):
    """Gradients of a table, as rows that were asked for.

    Args:
        indices: [n, t], integers.
        g: gradient of what was looked up, [n, t, d].
        shape: of the table, [v, ...] with d numbers a row.
        padding: a row that receives nothing; None: there is none.
    """

    def __init__(self, indices: Tensor, g: Tensor, shape: torch.Size, padding: int | None) -> None:
        self.indices = indices
        self.g = g if padding is None else g.masked_fill((indices == padding).unsqueeze(2), 0)
        self.shape = shape
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None

    def _distinct(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each example and row that it asked for: the example, the row, and the sum of gradients, [., d]."""
        if self._rows is None:
            n = len(self.indices)
            table = self.shape[0]
            keys = self.indices + table * torch.arange(n, device=self.indices.device).unsqueeze(1)
            distinct, where = torch.unique(keys, return_inverse=True)
            sums = self.g.new_zeros(len(distinct), self.g.shape[2]).index_add_(0, where.flatten(), self.g.flatten(0, 1))
            self._rows = distinct // table, distinct % table, sums
        return self._rows

    def _norms_squared(self) -> Tensor:
        examples, _, sums = self._distinct()
        # In float64: index_add adds one after another, and 100,000 equal float32 squares came out 4e-4 too small.
        squares = sums.square().sum(1).double()
        return squares.new_zeros(len(self.indices)).index_add_(0, examples, squares).to(sums.dtype)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See `Contribution`."""
        examples, rows, sums = self._distinct()
        table = self.g.new_zeros(self.shape[0], self.g.shape[2])
        table.index_add_(0, rows, sums * weights.to(sums.dtype)[examples].unsqueeze(1))
        return table.view(self.shape)

    def materialize(self) -> Tensor:
        """See `Contribution`."""
        n = len(self.indices)
        keys = self.indices + self.shape[0] * torch.arange(n, device=self.indices.device).unsqueeze(1)
        tables = self.g.new_zeros(n * self.shape[0], self.g.shape[2])
        tables.index_add_(0, keys.flatten(), self.g.flatten(0, 1))
        return tables.view(n, *self.shape)

    def rows(self, index: Tensor) -> Lookups:
        """See `Contribution`."""
        return Lookups(self.indices[index], self.g[index], self.shape, None)

    def double(self) -> Lookups:
        """See `Contribution`."""
        return Lookups(self.indices, self.g.double(), self.shape, None)

    def joined(self, others: Iterable[Contribution]) -> Contribution | None:
        """More lookups in the same table; or a product with it (an output layer tied to the embedding)."""
        others = list(others)
        lookups = [self, *(other for other in others if isinstance(other, Lookups))]
        rest = [other for other in others if not isinstance(other, Lookups)]
        indices = torch.cat([part.indices for part in lookups], 1)
        joined = Lookups(indices, torch.cat([part.g for part in lookups], 1), self.shape, None)
        if not rest:
            return joined
        products = rest[0].joined(rest[1:]) if len(rest) > 1 else rest[0]
        if isinstance(products, OuterProducts) and Tied.can_join(joined, products):
            return Tied(joined, products.keeping_operands())
        return None


class Tied(Contribution):
    """A table used by lookups and as the weight of a linear layer, without materialising either.

    |G_lookups + G_products|^2 has one cross term more: twice the sum over positions t and lookups u of
    g[t, v(u)] (a[t] . e[u]), with e the lookups' gradients.
    """

    def __init__(self, lookups: Lookups, products: OuterProducts) -> None:
        self._lookups = lookups
        self._products = products

    @staticmethod
    def can_join(lookups: Lookups, products: OuterProducts) -> bool:
        """Whether the products are those of a linear layer whose outputs are the table's rows, not yet reduced."""
        plain = Arrangement(shape=tuple(lookups.shape), order=(0, 1))
        return len(lookups.shape) == 2 and products.arrangement == plain and products.a is not None

    def _norms_squared(self) -> Tensor:
        a, g = self._products.a, self._products.g
        assert a is not None
        assert g is not None
        a, g, e = a.squeeze(1), g.squeeze(1), self._lookups.g
        met = g.gather(2, self._lookups.indices.unsqueeze(1).expand(-1, g.shape[1], -1))  # [n, t, u]
        cross = (torch.bmm(a, e.mT) * met).sum((1, 2))
        own = self._lookups.norms_squared() + self._products.norms_squared()
        # What rounding can take from the difference: a few units of the sum's terms.
        margin = 8 * torch.finfo(own.dtype).eps * own
        return (own + 2 * cross).clamp_min(0) + margin

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See `Contribution`."""
        return self._products.weighted_sum(weights) + self._lookups.weighted_sum(weights)

    def materialize(self) -> Tensor:
        """See `Contribution`."""
        return self._products.materialize() + self._lookups.materialize()

    def rows(self, index: Tensor) -> Tied:
        """See `Contribution`."""
        return Tied(self._lookups.rows(index), self._products.rows(index))

    def double(self) -> Tied:
        """See `Contribution`."""
        return Tied(self._lookups.double(), self._products.double())


def embedding(
    call: RuleCall,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """torch.embedding, which F.embedding ends in; padding_idx -1 is none."""
    if scale_grad_by_freq:
        return NotImplemented  # divides by counts over the batch
    return _looked_up(call, weight, indices, None if padding_idx < 0 else padding_idx, torch.embedding)


def index_select(call: RuleCall, weight: Tensor, dim: int, index: Tensor) -> Any:
    """Rows of a learned table by index_select."""
    return _looked_up(call, weight, index, None, _selected) if dim == 0 else NotImplemented


def getitem(call: RuleCall, weight: Tensor, index: Any) -> Any:
    """Rows of a learned table by one tensor of integers."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        return NotImplemented
    return NotImplemented if index.dtype == torch.uint8 else _looked_up(call, weight, index, None, operator.getitem)


def embedding_bag(
    call: RuleCall,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """F.embedding_bag of bags of equal length, [bags, lookups]; sums and means."""
    source, axis, output_axis = call.source(weight), call.axis(input), call.output_axis
    if (
        source is None
        or axis is None
        or output_axis is None
        or call.source(per_sample_weights) is not None
        or (input.ndim, axis.position, offsets, max_norm, scale_grad_by_freq) != (2, 0, None, None, False)
        or mode == "max"
    ):
        return NotImplemented
    output = F.embedding_bag(
        input,
        call.constant(weight),
        mode=mode,
        per_sample_weights=per_sample_weights,
        padding_idx=padding_idx,
    )
    shape = weight.shape
    padding = None if padding_idx is None else padding_idx % shape[0]
    kept = (input,) if per_sample_weights is None else (input, per_sample_weights)

    def contributions(kept: tuple[Tensor, ...], gradient: Tensor) -> Iterable[tuple[Source, Contribution]]:
        asked = axis.to_front(kept[0], call.examples)  # [n, k, t]
        g = call.front(gradient, output_axis).unsqueeze(2)  # [n, k, 1, d]
        if mode == "mean":
            counted = torch.ones_like(asked) if padding is None else (asked != padding).long()
            g = g / counted.sum(2).clamp_min(1).unsqueeze(2).unsqueeze(3)
        g = g.expand(-1, -1, asked.shape[2], -1)
        if len(kept) == 2:
            g = g * call.front(kept[1], axis).unsqueeze(3)
        yield source, Lookups(asked.flatten(1), g.flatten(1, 2), shape, padding)

    return call.tap(output, kept, contributions, source)


def _selected(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index)


def _looked_up(
    call: RuleCall,
    weight: Tensor,
    indices: Tensor,
    padding: int | None,
    look_up: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    source, axis, output_axis = call.source(weight), call.axis(indices), call.output_axis
    if source is None or axis is None or output_axis is None or weight.ndim < 1:
        return NotImplemented
    output = look_up(call.constant(weight), indices)
    shape = weight.shape

    def contributions(kept: tuple[Tensor, ...], gradient: Tensor) -> Iterable[tuple[Source, Contribution]]:
        asked = axis.to_front(kept[0], call.examples).flatten(1).long()  # [n, t]
        asked = asked.where(asked >= 0, asked + shape[0])
        g = call.front(gradient, output_axis).reshape(*asked.shape, shape[1:].numel())
        yield source, Lookups(asked, g, shape, padding)

    return call.tap(output, (indices,), contributions, source)


RULES: dict[Any, Rule] = {
    torch.embedding: embedding,
    F.embedding_bag: embedding_bag,
    torch.index_select: index_select,
    torch.Tensor.index_select: index_select,
    torch.Tensor.__getitem__: getitem,
}
