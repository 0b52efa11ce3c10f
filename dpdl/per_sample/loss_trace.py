"""Checks that a loss is the mean or sum over examples that it is declared to be, by running it again.

On the first batches the model's outputs remember the operations that are applied to them, up to
`backward()`. There the loss is computed again for the first half of the examples alone. For a mean, the
gradients of their outputs grow by N / half; for a sum, they stay; for a loss that mixes examples (a
contrastive term, a mean weighted by class), neither.

What belongs to the examples among the numbers and tensors that the loss uses is not marked, so it is read
in several ways (`_READINGS`): the first half of a target, of a target with several rows an example, of a
Python number that equals N (`loss.sum() / len(y)`). A relation that holds in any reading is possible. A
mean is believed before a sum, because only a number that follows the batch can make a sum look like one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dpdl.errors import LossError
from dpdl.execution import LossReduction

__all__ = ["LossTrace"]

# Relative difference of gradients that still counts as equal.
TOLERANCE = 1e-3

# Gradients beyond this belong to examples that are about to be left out; their squares would overflow.
LARGEST = 1e100

Verdict = Literal["mean", "sum", "neither"]


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """What is taken to follow the batch: whatever equals N, or is a multiple of N, or no number at all.

    Attributes:
        rows: of a tensor's first axis.
        numbers: of Python numbers.
    """

    rows: Literal["multiple", "equal"]
    numbers: Literal["multiple", "equal", "none"]

    def scaled(self, value: float, size: int, part: int, what: Literal["rows", "numbers"]) -> float:
        """A length or number as it would be for `part` instead of `size` examples."""
        rule = self.rows if what == "rows" else self.numbers
        follows = value == size if rule == "equal" else rule == "multiple" and value > 0 and value % size == 0
        return type(value)(value / size * part) if follows else value


_READINGS = tuple(
    _Reading(rows=rows, numbers=numbers)
    for rows in ("multiple", "equal")
    for numbers in ("multiple", "equal", "none")
)


class LossTrace:
    """Follows outputs from the model to the loss.

    Args:
        outputs: differentiable outputs of the model; use `self.outputs` in their place.
        batch_axes: the batch axis of each.
        batch_size: N >= 2.
        loss_reduction: what was declared.
        on_checked: called before the backward with whether the loss could be checked.

    Raises (from `backward()` of a loss computed from the outputs):
        LossError: the loss is not what was declared.
    """

    def __init__(
        self,
        outputs: list[Tensor],
        *,
        batch_axes: list[int],
        batch_size: int,
        loss_reduction: LossReduction,
        on_checked: Callable[[bool], None],
    ) -> None:
        self._axes = batch_axes
        self._size = batch_size
        self._reduction = loss_reduction
        self._on_checked = on_checked
        self._calls: list[_TracedCall] = []
        self._done = False
        self._originals = [output.detach().clone() for output in outputs]
        # Clones: an alias of a custom function's output could not be written to in place.
        self.outputs = [self._follow(output.clone()) for output in outputs]

    def _follow(self, tensor: Tensor) -> Tensor:
        followed = tensor.as_subclass(_Followed)
        followed._trace = self
        return followed

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> Any:
        """Remember a call, and follow the tensors that it returns."""
        if self._done:
            return result
        result = tree_map(lambda leaf: self._follow(leaf) if isinstance(leaf, Tensor) else leaf, result)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if results or function is Tensor.__setitem__:
            self._calls.append(_TracedCall(function=function, args=args, kwargs=kwargs, results=results))
        return result

    def check(self, loss: Tensor) -> None:
        """Compare the whole loss with that of half of the examples; runs once, before the backward."""
        if self._done:
            return
        self._done = True
        half = (self._size + 1) // 2
        possible: set[Verdict] = set()
        for reading in _READINGS:
            try:
                whole = self._output_gradients(loss, self._size, reading)
                part = self._output_gradients(loss, half, reading)
            except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
                continue  # read like this, the loss cannot be computed for fewer examples
            rows = [g.narrow(axis, 0, half) for g, axis in zip(whole, self._axes, strict=True)]
            relation = _relation(rows, part, size=self._size, half=half)
            if relation is not None:
                possible.add(relation)
        self._calls.clear()
        self._originals.clear()
        self.outputs.clear()
        if possible:
            _refuse_other_than(self._reduction, possible, size=self._size)
        self._on_checked(bool(possible))

    def _output_gradients(self, loss: Tensor, rows: int, reading: _Reading) -> list[Tensor]:
        """Gradients of the loss with respect to the outputs of the first `rows` examples alone."""
        starts = [
            original.narrow(axis, 0, rows).clone().requires_grad_()
            for original, axis in zip(self._originals, self._axes, strict=True)
        ]
        with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
            # * 1: an in-place loss may write to what it is given
            known = {id(followed): start * 1 for followed, start in zip(self.outputs, starts, strict=True)}

            def substitute(leaf: Any) -> Any:
                if type(leaf) in (int, float):
                    return reading.scaled(leaf, self._size, rows, "numbers")
                if not isinstance(leaf, Tensor):
                    return leaf
                if id(leaf) in known:
                    return known[id(leaf)]
                # A copy: the loss may also write to tensors of its own, which must not happen twice.
                copy = leaf.as_subclass(Tensor).detach().clone()
                if copy.ndim:
                    copy = copy[: int(reading.scaled(copy.shape[0], self._size, rows, "rows"))]
                return copy

            for call in self._calls:
                again = call.function(*tree_map(substitute, call.args), **tree_map(substitute, call.kwargs))
                fresh = [leaf for leaf in tree_leaves(again) if isinstance(leaf, Tensor)]
                known.update({id(old): new for old, new in zip(call.results, fresh, strict=True)})
            found = torch.autograd.grad(known[id(loss)], starts, allow_unused=True)
        return [torch.zeros_like(s) if g is None else g for s, g in zip(starts, found, strict=True)]


@dataclass(frozen=True, kw_only=True)
class _TracedCall:
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    results: list[Tensor]


def _relation(whole: list[Tensor], part: list[Tensor], *, size: int, half: int) -> Verdict | None:
    """How output gradients of the same examples, among `size` and among `half` examples, are related.

    None if they are all zero, which says nothing.
    """
    a = torch.cat([g.flatten().double() for g in whole])
    b = torch.cat([g.flatten().double() for g in part])
    known = (a.abs() < LARGEST) & (b.abs() < LARGEST)  # not so for NaN either
    a, b = a[known], b[known]
    if not bool((a != 0).any()) and not bool((b != 0).any()):
        return None
    relations: dict[Verdict, float] = {"mean": size / half, "sum": 1.0}
    for verdict, factor in relations.items():
        if float((a * factor - b).norm()) <= TOLERANCE * float(b.norm()):
            return verdict
    return "neither"


def _refuse_other_than(declared: LossReduction, possible: set[Verdict], *, size: int) -> None:
    """Raise unless the loss is what was declared.

    Raises:
        LossError: saying what the loss is instead.
    """
    actual = next(verdict for verdict in ("mean", "sum", "neither") if verdict in possible)
    if actual == declared:
        return
    if actual == "neither":
        raise LossError(
            f"The loss is neither a mean nor a sum over the {size} examples of the batch: leaving examples out "
            "changed the gradients of those that stay by more than a constant. A term that compares examples, "
            "or a mean weighted by class or token, lets one example change another's gradient. Compute each "
            f"example's own loss (reduction='none') and take its {declared}."
        )
    raise LossError(
        f"The loss is a {actual} over the {size} examples of the batch, but loss_reduction={declared!r} was "
        "declared: every gradient would be clipped at the wrong length. Set Execution(loss_reduction="
        f"{actual!r}), or reduce the loss by a {declared}."
    )


class _Followed(Tensor):
    """A tensor whose operations are remembered by a `LossTrace`."""

    _trace: LossTrace

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        trace = next(
            (
                leaf._trace
                for leaf in tree_leaves((args, kwargs))
                if isinstance(leaf, _Followed) and hasattr(leaf, "_trace")
            ),
            None,
        )
        if func is Tensor.backward and trace is not None:
            trace.check(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if trace is None or func in _ENDS:
            return result
        return trace.record(func, args, kwargs, result)


# Calls after which nothing differentiable is left to follow.
_ENDS = {Tensor.backward, Tensor.detach}
