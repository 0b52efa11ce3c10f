"""Per-sample gradients as a tape has recorded them: contributions to sources, pulled back where need be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dpdl.per_sample.engine import accumulation_dtype
from dpdl.per_sample.squared_norms import squared_norms
from dpdl.per_sample.tape.contribution import Contribution, Materialized
from dpdl.per_sample.tape.rowwise import RowwisePullBack, rowwise_pull_back
from dpdl.per_sample.tape.source import Source, disjoint

__all__ = ["TapeGradients"]

# Numbers that are pulled back at once, for a few examples: about what a core's caches hold.
NUMBERS_PULLED_BACK = 2**20


class TapeGradients:
    """Gradients of n examples' own losses.

    Args:
        received: what each source has received.
        parameters: all parameters that are differentiated by, by name.
        examples: n.
        accumulate_dtype: the least precise dtype of norms and sums.
    """

    def __init__(
        self,
        received: Mapping[Source, Sequence[Contribution]],
        parameters: Mapping[str, Tensor],
        *,
        examples: int,
        accumulate_dtype: torch.dtype,
    ) -> None:
        self._parameters = parameters
        self._examples = examples
        self._accumulate_dtype = accumulate_dtype
        by_parameter: dict[str, set[Source]] = {}
        for source in received:
            for name in source.parameters:
                by_parameter.setdefault(name, set()).add(source)
        joined = {source: _joined(parts) for source, parts in received.items()}
        self._own: dict[Source, Contribution] = {}  # norms of the source are norms of its one parameter
        self._rowwise: dict[Source, tuple[Contribution, RowwisePullBack]] = {}  # norms of it tell those behind it
        self._pulled: dict[Source, Materialized] = {}  # must reach the parameters before norms are known
        for source, contribution in joined.items():
            others = [other for name in source.parameters for other in by_parameter[name]]
            moved = all(other.moved and not other.rounded for other in others)
            if moved and disjoint(list(dict.fromkeys(others)), parameters):
                self._own[source] = contribution
            elif all(other is source for other in others) and (way := self._rowwise_way(source)) is not None:
                self._rowwise[source] = (contribution, way)
            else:
                self._pulled[source] = Materialized(contribution.materialize())

    def _rowwise_way(self, source: Source) -> RowwisePullBack | None:
        dtypes = {source.tensor.dtype, *(self._parameters[name].dtype for name in source.parameters)}
        if source.rounded or dtypes != {accumulation_dtype(source.tensor.dtype, self._accumulate_dtype)}:
            return None
        return rowwise_pull_back(source, self._parameters)

    def norms(self) -> Tensor:
        """L2 norm over all parameters, [n], in the widest accumulation dtype.

        A norm that overflows although the gradient is finite is computed again in float64.
        """
        widest = self._accumulate_dtype
        for parameter in self._parameters.values():
            widest = accumulation_dtype(parameter.dtype, widest)
        squares = [part.norms_squared().double() for part in self._own.values()]
        squares += [self._squares_by_rows(source) for source in self._rowwise]
        if self._pulled:
            squares.append(self._squares_behind(self._pulled, torch.arange(self._examples)))
        if not squares:
            return torch.zeros(self._examples, dtype=widest)
        device = squares[0].device
        norms = torch.stack([square.to(device) for square in squares]).sum(0).sqrt()
        large = (~torch.isfinite(norms)).nonzero().flatten()
        if len(large):
            again = [part.rows(large).double().norms_squared() for part in self._own.values()]
            for source, (part, _) in self._rowwise.items():
                again.append(self._squares_behind({source: part}, large, in_double=True))
            if self._pulled:
                again.append(self._squares_behind(self._pulled, large, in_double=True))
            norms[large] = torch.stack([square.to(device) for square in again]).sum(0).sqrt()
        return norms.to(widest)

    def _squares_by_rows(self, source: Source) -> Tensor:
        """Squared norms over the parameters behind a source, [n], pulled back only where rounding may show."""
        part, way = self._rowwise[source]
        squares, unsure = way.norms_squared(part)
        squares, index = squares.double(), unsure.nonzero().flatten()
        if len(index):
            squares[index] = self._squares_behind({source: part}, index).to(squares.device)
        return squares

    def _squares_behind(
        self, parts: Mapping[Source, Contribution], examples: Tensor, *, in_double: bool = False
    ) -> Tensor:
        """Squared norms over the parameters that several sources share, or that stand behind a computation, [.]."""
        found = []
        for some in self._few_at_once(parts, examples):
            rows = self._rows_behind(parts, some)
            squares = [squared_norms(row.double() if in_double else row).double() for row in rows.values()]
            found.append(torch.stack([square.to(squares[0].device) for square in squares]).sum(0))
        return torch.cat(found)

    def _few_at_once(self, parts: Mapping[Source, Contribution], examples: Tensor) -> Sequence[Tensor]:
        """So few that what is pulled back stays in the cache."""
        numbers = sum(source.tensor.numel() for source in parts)
        few: Sequence[Tensor] = examples.split(max(1, NUMBERS_PULLED_BACK // max(1, numbers)))
        return few

    def _rows_behind(self, parts: Mapping[Source, Contribution], index: Tensor) -> dict[str, Tensor]:
        """Per-sample gradients of those parameters, for the examples at `index`."""
        rows: dict[str, Tensor] = {}
        for source, part in parts.items():
            for name, gradient in self._pull_back_rows(source, part.rows(index.to(source.tensor.device))).items():
                wide = gradient.to(accumulation_dtype(gradient.dtype, self._accumulate_dtype))
                rows[name] = rows[name] + wide if name in rows else wide
        return rows

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """sum_n weights[n] * gradient_n for each parameter; examples of weight 0 do not enter at all."""
        kept = weights != 0
        all_kept = bool(kept.all())
        total: dict[Source, Tensor] = {}
        by_rows = any(source.rounded for source in self._pulled)
        at_sources = [*self._own.items(), *((source, part) for source, (part, _) in self._rowwise.items())]
        at_sources += [] if by_rows else self._pulled.items()
        for source, part in at_sources if bool(kept.any()) else []:
            device = source.tensor.device
            chosen, factors = part, weights.to(device)
            if not all_kept:
                index = kept.nonzero().flatten().to(device)
                chosen, factors = part.rows(index), factors[index]
            total[source] = chosen.weighted_sum(factors)
        sums: dict[str, Tensor] = {}
        for source in [source for source in total if source.is_parameter]:
            name = source.parameters[0]
            sums[name] = total.pop(source).reshape(self._parameters[name].shape)
        pulled = [self._pull_back(total)]
        if by_rows:
            few = self._few_at_once(self._pulled, kept.nonzero().flatten())
            pulled += [self._sum_of_rows(weights, some) for some in few]
        for name, gradient in (pair for part in pulled for pair in part.items()):
            sums[name] = sums[name] + gradient if name in sums else gradient
        for name, p in self._parameters.items():
            dtype = accumulation_dtype(p.dtype, self._accumulate_dtype)
            sums[name] = sums[name].to(dtype) if name in sums else torch.zeros_like(p, dtype=dtype).detach()
        return sums

    def _sum_of_rows(self, weights: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Part of the weighted sum, from the rows that norms are taken of."""
        return {
            name: Materialized(rows).weighted_sum(weights[index].to(rows.device))
            for name, rows in self._rows_behind(self._pulled, index).items()
        }

    def materialize(self) -> dict[str, Tensor]:
        """The gradients themselves: parameter name to [n, *shape]."""
        gradients = self._rows_behind(self._pulled, torch.arange(self._examples)) if self._pulled else {}
        for source, part in [*self._own.items(), *((source, part) for source, (part, _) in self._rowwise.items())]:
            for name, rows in self._pull_back_rows(source, part).items():
                gradients[name] = gradients[name] + rows if name in gradients else rows
        for name, p in self._parameters.items():
            if name not in gradients:
                gradients[name] = p.new_zeros((self._examples, *p.shape))
        return gradients

    def _pull_back(self, total: Mapping[Source, Tensor]) -> dict[str, Tensor]:
        """From sums at sources to sums at parameters."""
        if not total:
            return {}
        sources = list(total)
        names = list(dict.fromkeys(name for source in sources for name in source.parameters))
        gradients = torch.autograd.grad(
            [source.tensor for source in sources],
            [self._parameters[name] for name in names],
            [total[source].to(source.tensor.dtype) for source in sources],
            retain_graph=True,
            allow_unused=True,
        )
        return {name: g for name, g in zip(names, gradients, strict=True) if g is not None}

    def _pull_back_rows(self, source: Source, part: Contribution) -> dict[str, Tensor]:
        """Per-sample gradients of the parameters behind a source, from those of the source."""
        rows = part.materialize()
        if source.is_parameter:
            return {source.parameters[0]: rows}
        alone = len(rows) == 1  # without vmap, whose rules are slower than the operations' own
        gradients = torch.autograd.grad(
            source.tensor,
            [self._parameters[name] for name in source.parameters],
            rows[0].to(source.tensor.dtype) if alone else rows.to(source.tensor.dtype),
            is_grads_batched=not alone,
            retain_graph=True,
            allow_unused=True,
        )
        found = {name: g for name, g in zip(source.parameters, gradients, strict=True) if g is not None}
        return {name: g.unsqueeze(0) for name, g in found.items()} if alone else found


def _joined(parts: Sequence[Contribution]) -> Contribution:
    """The sum of several contributions to one source."""
    first, *others = parts
    if not others:
        return first
    for k, candidate in enumerate(parts):  # by position: one object may have been received twice
        joined = candidate.joined([*parts[:k], *parts[k + 1 :]])
        if joined is not None:
            return joined
    return Materialized(torch.stack([part.materialize() for part in parts]).sum(0))
