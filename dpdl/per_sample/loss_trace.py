"""Checks that a loss is the mean or sum over examples that it is declared to be, by running it again.

On the first batch the model's outputs remember the operations that are applied to them, up to
`backward()`. There the loss is computed again for the first half of the examples alone. For a mean, the
gradients of their outputs grow by N / half; for a sum, they stay; for a loss that mixes examples (a
contrastive term, a mean weighted by class), neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dpdl.errors import LossError
from dpdl.execution import LossReduction

__all__ = ["LossTrace", "refuse_wrong_reduction"]

# Relative difference of gradients that still counts as equal.
TOLERANCE = 1e-3

_Slicing = Callable[[Tensor, int], bool]

# Which of the tensors that meet the outputs in the loss carry examples? A target may have one row an
# example, or several (tokens flattened into the batch), and a constant may have that many rows by chance.
# The declaration stands if one reading of the loss confirms it.
_SLICINGS: tuple[_Slicing, ...] = (
    lambda tensor, size: tensor.shape[0] % size == 0,
    lambda tensor, size: tensor.shape[0] == size,
    lambda tensor, size: False,
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
        half = self._size // 2
        failure: LossError | None = None
        confirmed = False
        for slicing in _SLICINGS:
            try:
                whole = self._output_gradients(loss, self._size, slicing)
                part = self._output_gradients(loss, half, slicing)
            except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
                continue  # read like this, the loss cannot be computed for fewer examples
            rows = [g.narrow(axis, 0, half) for g, axis in zip(whole, self._axes, strict=True)]
            try:
                refuse_wrong_reduction(rows, part, size=self._size, half=half, loss_reduction=self._reduction)
            except LossError as error:
                failure = failure or error
            else:
                confirmed = True
                break
        self._calls.clear()
        self._originals.clear()
        self.outputs.clear()
        if failure is not None and not confirmed:
            raise failure
        self._on_checked(confirmed)

    def _output_gradients(self, loss: Tensor, rows: int, slicing: _Slicing) -> list[Tensor]:
        """Gradients of the loss with respect to the outputs of the first `rows` examples alone."""
        starts = [
            original.narrow(axis, 0, rows).clone().requires_grad_()
            for original, axis in zip(self._originals, self._axes, strict=True)
        ]
        with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
            # * 1: an in-place loss may write to what it is given
            known = {id(followed): start * 1 for followed, start in zip(self.outputs, starts, strict=True)}

            def substitute(leaf: Any) -> Any:
                if not isinstance(leaf, Tensor):
                    return leaf
                if id(leaf) in known:
                    return known[id(leaf)]
                # A copy: the loss may also write to tensors of its own, which must not happen twice.
                copy = leaf.as_subclass(Tensor).detach().clone()
                if copy.ndim and slicing(copy, self._size):
                    return copy[: copy.shape[0] // self._size * rows]
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


def refuse_wrong_reduction(
    whole: list[Tensor], part: list[Tensor], *, size: int, half: int, loss_reduction: LossReduction
) -> None:
    """Compare output gradients of the same examples, computed among `size` and among `half` examples.

    Raises:
        LossError: they are not related as `loss_reduction` says.
    """
    a = torch.cat([g.flatten().double() for g in whole])
    b = torch.cat([g.flatten().double() for g in part])
    known = torch.isfinite(a) & torch.isfinite(b)
    a, b = a[known], b[known]
    if not bool((a != 0).any()) and not bool((b != 0).any()):
        return  # a loss without gradient is both

    def related_by(factor: float) -> bool:
        return float((a * factor - b).norm()) <= TOLERANCE * float(b.norm())

    is_mean, is_sum = related_by(size / half), related_by(1.0)
    if (loss_reduction == "mean" and is_mean) or (loss_reduction == "sum" and is_sum):
        return
    other = "mean" if is_mean else "sum" if is_sum else None
    if other is not None:
        raise LossError(
            f"The loss is a {other} over the {size} examples of the batch, but loss_reduction="
            f"{loss_reduction!r} was declared: every gradient would be clipped at the wrong length. Set "
            f"Execution(loss_reduction={other!r}), or reduce the loss by a {loss_reduction}."
        )
    raise LossError(
        f"The loss is neither a mean nor a sum over the {size} examples of the batch: leaving examples out "
        "changed the gradients of those that stay by more than a constant. A term that compares examples, or "
        "a mean weighted by class or token, lets one example change another's gradient. Compute "
        f"each example's own loss (reduction='none') and take its {loss_reduction}."
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
