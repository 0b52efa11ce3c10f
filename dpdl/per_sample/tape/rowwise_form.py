"""What becomes of gradients on their way back through a derivation, read off autograd's own graph.

A stand-in for the gradients of all examples goes back through the graph in their place. It has a shape and no numbers:
each operation that meets it changes its `Form`, a sum of

    scale[o, d] g[n, o, d]    and terms    multiplier_t[o] <slot_t[o], g[n, o]> factor_t[o, d],

linear in the gradients g that it started from. An operation that would leave this form raises `NotRowwise`.

Axes: n example, o row (what the derived tensor's first axis counts), d column (the rest), t term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Form", "NotRowwise", "Term", "forms_at"]


class NotRowwise(Exception):
    """A derivation does something else than `Form` can say."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Term:
    """multiplier[o] <slot[o], g[n, o]> factor[o, d].

    Attributes:
        multiplier: [o].
        slot: [o, columns of g]; None: ones.
        factor: [o, d]; None: ones.
    """

    multiplier: Tensor
    slot: Tensor | None
    factor: Tensor | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Form:
    """Gradients [n, *shape], n left out.

    Attributes:
        rows: o.
        shape: of the tensor whose gradients these are; rows by columns in the order of its numbers.
        row_scale: [o], what g itself is multiplied by; None: g itself does not enter.
        scale: [o, d], multiplied to that; None: ones.
        terms: what is added.
        lost: [o], what has cancelled: so much more than the form says entered it, as an L2 norm over |g[n, o]|. It
            counts in the rounding.
    """

    rows: int
    shape: tuple[int, ...]
    row_scale: Tensor | None
    scale: Tensor | None = None
    terms: tuple[Term, ...] = ()
    lost: Tensor | float = 0.0

    @property
    def columns(self) -> int:
        """d."""
        return math.prod(self.shape) // self.rows

    def viewed(self, shape: Sequence[int]) -> Form:
        """The same numbers in the same order."""
        known = -math.prod(shape) if -1 in shape else 1
        sizes = tuple(math.prod(self.shape) // known if size == -1 else size for size in shape)
        return replace(self, shape=sizes)

    def expanded(self, shape: Sequence[int]) -> Form:
        """One number a row as many columns."""
        if tuple(shape) == self.shape:
            return self
        split = self._first_column(self.shape)
        if len(shape) != len(self.shape) or any(
            size not in (-1, own) for size, own in zip(shape[:split], self.shape[:split], strict=True)
        ):
            raise NotRowwise
        sizes = tuple(own if size == -1 else size for size, own in zip(shape, self.shape, strict=True))
        if self.columns != 1 or self.row_scale is not None or any(term.factor is not None for term in self.terms):
            raise NotRowwise
        return replace(self, shape=sizes, lost=self.lost * math.sqrt(math.prod(sizes) // self.rows))

    def summed(self, axes: Sequence[int], keep: bool) -> Form:
        """The sum over all columns."""
        axes = [axis % len(self.shape) for axis in (axes or range(len(self.shape)))]
        split = self._first_column(self.shape)
        gone = [i for i in axes if self.shape[i] != 1]
        columns = [i for i in range(split, len(self.shape)) if self.shape[i] != 1]
        if gone and gone != columns:
            raise NotRowwise
        shape = tuple(1 if i in axes else size for i, size in enumerate(self.shape) if keep or i not in axes)
        if not gone:
            return replace(self, shape=shape)
        terms, lost = [], self.lost * math.sqrt(self.columns)
        for t in self.terms:
            total: Any = self.columns if t.factor is None else t.factor.sum(1)
            if t.factor is not None:
                length = math.sqrt(self.columns) if t.slot is None else torch.linalg.vector_norm(t.slot, dim=1)
                lost = lost + t.multiplier.abs() * length * (t.factor.abs().sum(1) - total.abs())
            terms.append(replace(t, multiplier=t.multiplier * total, factor=None))
        if self.row_scale is not None:
            terms.append(Term(multiplier=self.row_scale, slot=self.scale, factor=None))
        return replace(self, shape=shape, row_scale=None, scale=None, terms=tuple(terms), lost=lost)

    def times(self, other: Any) -> Form:
        """Multiplied by what is the same for all examples."""
        if isinstance(other, Tensor) and other.ndim > 0:
            shape = torch.broadcast_shapes(other.shape, self.shape)
            if shape != self.shape:
                return self.expanded(shape).times(other)
        by_row, full = self._constant(other)
        row_scale, scale, terms = self.row_scale, self.scale, self.terms
        if by_row is not None:
            row_scale = None if row_scale is None else row_scale * by_row
            return replace(
                self,
                row_scale=row_scale,
                terms=tuple(replace(t, multiplier=t.multiplier * by_row) for t in terms),
                lost=self.lost * abs(by_row),
            )
        assert full is not None  # one of the two
        if row_scale is not None:
            scale = full if scale is None else scale * full
        terms = tuple(replace(t, factor=full if t.factor is None else t.factor * full) for t in terms)
        return replace(self, scale=scale, terms=terms, lost=self.lost * full.abs().amax(1))

    def plus(self, other: Form) -> Form:
        """The sum of two."""
        if self.shape != other.shape:
            shape = torch.broadcast_shapes(self.shape, other.shape)
            return self.expanded(shape).plus(other.expanded(shape))
        terms, lost = self.terms + other.terms, self.lost + other.lost
        if self.row_scale is None or other.row_scale is None:
            first = self if other.row_scale is None else other
            return replace(first, terms=terms, lost=lost)
        if self.scale is None and other.scale is None:
            both = self.row_scale + other.row_scale
            lost = lost + (self.row_scale.abs() + other.row_scale.abs() - both.abs())
            return replace(self, row_scale=both, terms=terms, lost=lost)
        one, another = (
            row_scale.unsqueeze(1) * (1.0 if scale is None else scale)
            for row_scale, scale in ((self.row_scale, self.scale), (other.row_scale, other.scale))
        )
        one, another = torch.broadcast_tensors(one, another)
        lost = lost + (one.abs() + another.abs() - (one + another).abs()).amax(1)
        return replace(self, row_scale=torch.ones_like(self.row_scale), scale=one + another, terms=terms, lost=lost)

    def _constant(self, other: Any) -> tuple[Any, Tensor | None]:
        """A factor as one number, or one a row; or else as a number each, [o, d]."""
        if not isinstance(other, Tensor) or other.ndim == 0:
            return other, None
        split = self._first_column(self.shape)
        other = other if other.is_floating_point() else other.to(self._dtype)  # a mask
        aligned = other.view(*[1] * (len(self.shape) - other.ndim), *other.shape)
        if math.prod(aligned.shape[split:]) == 1:
            return aligned.expand(*self.shape[:split], *[1] * (len(self.shape) - split)).reshape(self.rows), None
        return None, aligned.expand(self.shape).reshape(self.rows, self.columns)

    @property
    def _dtype(self) -> torch.dtype:
        return self.terms[0].multiplier.dtype if self.row_scale is None else self.row_scale.dtype

    def _first_column(self, shape: tuple[int, ...]) -> int:
        for axis in range(len(shape) + 1):
            if math.prod(shape[:axis]) == self.rows:
                return axis
        raise NotRowwise


class _StandIn(Tensor):
    """A tensor without numbers, that autograd passes on in place of gradients."""

    form: Form

    @staticmethod
    def __new__(cls, form: Form, like: Tensor) -> _StandIn:
        made: _StandIn = torch.Tensor._make_wrapper_subclass(cls, form.shape, dtype=like.dtype, device=like.device)
        made.form = form
        return made

    def __init__(self, form: Form, like: Tensor) -> None:
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(function.overloadpacket)
        if rule is None or kwargs:
            raise NotRowwise
        forms = [a.form if isinstance(a, _StandIn) else a for a in args]
        like = next(a for a in args if isinstance(a, _StandIn))
        result = rule(*forms)
        if isinstance(result, tuple):
            return tuple(None if one is None else _StandIn(one, like) for one in result)
        if function._schema.is_mutable:
            args[0].form = result
            return args[0]
        return _StandIn(result, like)


def _mul(first: Any, second: Any) -> Form:
    form, other = (first, second) if isinstance(first, Form) else (second, first)
    return _only(form).times(_constant(other))


def _div(first: Any, second: Any) -> Form:
    other = _constant(second)
    return _only(first).times(other.reciprocal() if isinstance(other, Tensor) else 1 / other)


def _add(first: Any, second: Any) -> Form:
    return _only(first).plus(_only(second))


def _sub(first: Any, second: Any) -> Form:
    return _only(first).plus(_only(second).times(-1.0))


def _sum(form: Form, axes: Sequence[int] = (), keep: bool = False) -> Form:
    return form.summed(axes or (), keep)


def _where(condition: Any, first: Any, second: Any) -> Form:
    chosen, other = (first, second) if isinstance(first, Form) else (second, first)
    if not isinstance(other, Tensor) or other.numel() != 1 or float(other) != 0:
        raise NotRowwise
    mask = _constant(condition)
    return _only(chosen).times((mask if chosen is first else ~mask).to(other.dtype))


def _masked_fill(form: Form, mask: Any, value: Any) -> Form:
    if float(value) != 0:
        raise NotRowwise
    return _only(form).times(~_constant(mask))


def _unsqueeze(form: Form, axis: int) -> Form:
    position = axis % (len(form.shape) + 1)
    return form.viewed((*form.shape[:position], 1, *form.shape[position:]))


def _weight_norm(g: Form, v: Tensor, scale: Tensor, norms: Tensor, axis: int) -> tuple[Form, Form]:
    """w = scale v / norms, norms over all axes but one."""
    if axis != 0:
        raise NotRowwise
    along = _only(g).times(v).summed(tuple(range(1, v.ndim)), True).viewed(norms.shape)  # <g, v>
    off = along.times(-scale / norms.pow(3)).expanded(v.shape).times(v)
    return g.times(scale / norms).plus(off), along.times(norms.reciprocal())


def _batch_norm(
    g: Form,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Any,
    running_var: Any,
    mean: Tensor,
    inverse_deviation: Tensor,
    training: bool,
    epsilon: float,
    wanted: Sequence[bool],
) -> tuple[Form | None, Form | None, Form | None]:
    """Of a weight, one channel a row: [1, o, d]."""
    if not training or x.shape[0] != 1 or x.shape[1] != _only(g).rows:
        raise NotRowwise
    by_row = (1, g.rows, *[1] * (x.ndim - 2))
    normalised = (x - mean.view(by_row)) * inverse_deviation.view(by_row)
    columns = tuple(range(2, x.ndim))
    along, total = g.times(normalised).summed(columns, True), g.summed(columns, True)
    centred = g.plus(total.times(-1 / g.columns).expanded(x.shape)).plus(
        along.times(-1 / g.columns).expanded(x.shape).times(normalised)
    )
    factor = inverse_deviation if weight is None else inverse_deviation * weight
    found = (centred.times(factor.view(by_row)), along.viewed((g.rows,)), total.viewed((g.rows,)))
    of_input, of_weight, of_bias = (form if want else None for form, want in zip(found, wanted, strict=True))
    return of_input, of_weight, of_bias


def _only(form: Any) -> Form:
    if not isinstance(form, Form):
        raise NotRowwise
    return form


def _constant(value: Any) -> Any:
    if isinstance(value, Form):
        raise NotRowwise  # a product of two gradients
    return value


_aten = torch.ops.aten
_RULES: dict[Any, Callable[..., Any]] = {
    _aten.mul: _mul,
    _aten.div: _div,
    _aten.neg: lambda form: form.times(-1.0),
    _aten.add: _add,
    _aten.sub: _sub,
    _aten.sum: _sum,
    _aten.where: _where,
    _aten.masked_fill: _masked_fill,
    _aten.masked_fill_: _masked_fill,
    _aten.expand: lambda form, shape: form.expanded(shape),
    _aten.view: lambda form, shape: form.viewed(shape),
    _aten._unsafe_view: lambda form, shape: form.viewed(shape),
    _aten.unsqueeze: _unsqueeze,
    _aten.detach: lambda form: form,
    _aten.tanh_backward: lambda form, tanh: _only(form).times(1 - _constant(tanh).square()),
    _aten.sigmoid_backward: lambda form, sigmoid: _only(form).times(_constant(sigmoid) * (1 - sigmoid)),
    _aten._weight_norm_interface_backward: _weight_norm,
    _aten.native_batch_norm_backward: _batch_norm,
}


def forms_at(derived: Tensor, parameters: Sequence[Tensor]) -> list[Form | None]:
    """What gradients of `derived` are when they have come back to its parameters; None where none comes.

    Raises:
        NotRowwise: the derivation mixes rows, or does what is not known here.
    """
    if derived.ndim < 2 or derived.numel() == 0 or not derived.is_floating_point():
        raise NotRowwise
    rows = derived.shape[0]
    start = Form(rows=rows, shape=tuple(derived.shape), row_scale=derived.new_ones(rows).detach())
    found = torch.autograd.grad(derived, parameters, _StandIn(start, derived), retain_graph=True, allow_unused=True)
    forms: list[Form | None] = []
    for gradient in found:
        if gradient is not None and not isinstance(gradient, _StandIn):
            raise NotRowwise
        forms.append(None if gradient is None else gradient.form)
    return forms
