"""Pull-backs to parameters that act on each output channel alone: weight standardisation, weight norm, scalings.

The way back through a derivation W = f(V) is linear, and one map serves all examples. Where row o of W comes of row o
of V, that map mostly is a scaling and a few terms of rank one: for standardised weights, a projection onto the
complement of a constant and of the weight itself. `rowwise_form.py` reads it off the graph. With g[n, o] a row of an
example's gradient of W, norms at V need no more than |g[n, o]| and a few inner products with rows that all examples
share: one pass over g, and nothing is pulled back.

Norms are then differences. Where too much may have cancelled, examples are left to be pulled back one by one.

Axes: n example, o row, d column, k slot (what inner products are taken with), t term.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dpdl.per_sample.squared_norms import squared_norms
from dpdl.per_sample.tape.contribution import Contribution
from dpdl.per_sample.tape.convolution import ConvolutionContribution
from dpdl.per_sample.tape.rowwise_form import Form, NotRowwise, forms_at
from dpdl.per_sample.tape.source import Source

__all__ = ["RowwisePullBack", "rowwise_pull_back"]

# Squared norms are used where rounding moves them by no more than this, relatively.
TOLERANCE = 1e-3
# Rounding of an inner product of d numbers, over eps * |a| |b|: at most this, and d over the next. For equal numbers,
# the worst that was seen, it was d / 85.
ROUNDINGS, ADDED_IN_ONE = 4.0, 64
# Rows that differ by so many units of rounding are taken for the same.
SAME = 4.0
# Numbers of gradients that are looked at at once: what a core's caches hold.
NUMBERS_AT_ONCE = 2**20


def rowwise_pull_back(source: Source, parameters: Mapping[str, Tensor]) -> RowwisePullBack | None:
    """How gradients of a source reach its parameters; None if rows are mixed on the way, or it cannot be told."""
    try:
        found = forms_at(source.tensor, [parameters[name] for name in source.parameters])
    except (NotRowwise, RuntimeError, TypeError):  # the last two: of a user's own backward, which wants numbers
        return None
    return RowwisePullBack([form for form in found if form is not None])


class RowwisePullBack:
    """Norms behind a derivation.

    Args:
        forms: of each parameter's gradients.
    """

    def __init__(self, forms: list[Form]) -> None:
        self._forms = forms
        self._slots: list[Tensor | None] = []
        self._places: dict[int, int] = {}  # identity to position in `_slots`
        self._crossed: dict[tuple[int, int], int] = {}  # identities of scale and factor: where their product is
        self._held: list[Tensor] = []  # identities are good while tensors live
        for form in forms:
            for term in form.terms:
                self._place(term.slot)
        for form in forms:
            for term in form.terms if form.row_scale is not None else ():
                self._crossed[id(form.scale), id(term.factor)] = self._place(_product(form.scale, term.factor))

    def _place(self, slot: Tensor | None) -> int:
        """Where a slot is; one that is another but for rounding (a weight centred twice, say) is not taken in."""
        if id(slot) not in self._places:
            self._held += [] if slot is None else [slot]
            same = [k for k, other in enumerate(self._slots) if _is_rounded(slot, other)]
            self._places[id(slot)] = same[0] if same else len(self._slots)
            self._slots += [] if same else [slot]
        return self._places[id(slot)]

    def norms_squared(self, part: Contribution) -> tuple[Tensor, Tensor]:
        """Squared norms over the parameters, [n], and for which of them rounding may show, [n]."""
        rows = self._forms[0].rows
        squares: list[Tensor] = []
        scaled: dict[int, list[Tensor]] = {id(form.scale): [] for form in self._forms if form.scale is not None}
        scales = {id(form.scale): form.scale for form in self._forms if form.scale is not None}
        inner: list[Tensor] = []
        slots: Tensor | None = None
        for block in _blocks(part):
            g = block.reshape(len(block), rows, -1)
            if slots is None and self._slots:
                slots = self._slot_rows(g)
            squares.append(squared_norms(g.flatten(0, 1)).view(len(g), rows))
            if slots is not None:
                inner.append(torch.bmm(slots, g.permute(1, 2, 0)))  # [o, k, n]
            for key, scale in scales.items():
                scaled[key].append(squared_norms((g * scale).flatten(0, 1)).view(len(g), rows))
        return self._combined(
            torch.cat(squares),
            {key: torch.cat(parts) for key, parts in scaled.items()},
            torch.cat(inner, 2).permute(1, 2, 0).contiguous() if inner else None,
            slots,
        )

    def _slot_rows(self, g: Tensor) -> Tensor:
        """[o, k, d]."""
        ones = g.new_ones(())
        return torch.stack([(ones if slot is None else slot).expand(g.shape[1:]) for slot in self._slots], 1)

    def _combined(
        self, squares: Tensor, scaled: Mapping[int, Tensor], inner: Tensor | None, slots: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """From |g[n, o]|^2, |scale g[n, o]|^2 and <slot_k, g[n, o]>, [k, n, o]."""
        lengths = squares.sqrt()
        slot_lengths = None if slots is None else torch.linalg.vector_norm(slots, dim=2)  # [o, k]
        columns = 1 if slots is None else slots.shape[2]
        total, bound = torch.zeros_like(squares), torch.zeros_like(squares)
        for form in self._forms:
            size = lengths * form.lost
            if form.row_scale is not None:
                own = squares if form.scale is None else scaled[id(form.scale)]
                total += form.row_scale.square() * own
                size += form.row_scale.abs() * own.sqrt()
            terms = []
            for term in form.terms:
                assert inner is not None
                assert slot_lengths is not None
                k = self._places[id(term.slot)]
                coefficient = term.multiplier * inner[k]  # [n, o]
                terms.append((coefficient, term.factor))
                if form.row_scale is not None:
                    crossed = inner[self._crossed[id(form.scale), id(term.factor)]]
                    total += 2 * coefficient * form.row_scale * crossed
                factor = form.columns**0.5 if term.factor is None else torch.linalg.vector_norm(term.factor, dim=1)
                size += (term.multiplier * slot_lengths[:, k] * factor).abs() * lengths
            for i, (first, a) in enumerate(terms):
                for j, (second, b) in enumerate(terms[: i + 1]):
                    product = _product(a, b)
                    overlap = form.columns if product is None else product.sum(1)
                    total += (1 if i == j else 2) * first * second * overlap
            bound += size.square()
        eps = torch.finfo(squares.dtype).eps
        error = (ROUNDINGS + 2 * SAME + columns / ADDED_IN_ONE) * eps * bound.sum(1)
        found = total.sum(1).clamp(min=0)
        return found + error, ~(error <= TOLERANCE * found)  # not below the truth


def _is_rounded(slot: Tensor | None, other: Tensor | None) -> bool:
    """Whether each row is the other's within `SAME` units of rounding."""
    if slot is None or other is None:
        return slot is other
    if slot.shape != other.shape:
        return False
    apart, length = (torch.linalg.vector_norm(rows, dim=1) for rows in (slot - other, other))
    return bool((apart <= SAME * torch.finfo(slot.dtype).eps * length).all())


def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first * second


def _blocks(part: Contribution) -> Iterator[Tensor]:
    """Per-sample gradients, a few examples at a time."""
    if isinstance(part, ConvolutionContribution):
        yield from part.gradient_blocks()
        return
    gradients = part.materialize()
    yield from gradients.split(max(1, NUMBERS_AT_ONCE // max(1, gradients[0].numel())))
