"""Checks that a loss is the mean or sum over examples that it is declared to be, by running it again.

On some batches the tensors of the batch, and the model's outputs, remember the operations that are applied
to them, up to the step. At each `backward()` the loss is computed again for the first half of the examples alone.
For a mean, the gradients of their outputs grow by N / half; for a sum, they stay; for a loss that mixes
examples (a contrastive term, a mean weighted by class, a mean over the batch's unpadded tokens), neither. The
outputs may come from several forward passes over the batch.

What a loss takes from the batch as Python numbers (`len(y)`, `mask.sum().item()`) is not marked, so it is
read in several ways (`Reading`). A relation that holds in any reading is possible; a mean is believed
before a sum, because only a number that follows the batch can make a sum look like a mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dpdl.errors import LossError
from dpdl.execution import LossReduction
from dpdl.per_sample.loss_reading import READINGS, READINGS_OF_SEVERAL, Reading
from dpdl.per_sample.loss_relation import Verdict, relation_of
from dpdl.per_sample.randomness import isolated_randomness

__all__ = ["LossTrace", "untraced"]

# What only asks a tensor for its form. Everything else may write to it.
_ASKING = {"__get__", "__len__", "dim", "element_size", "is_complex", "is_floating_point", "numel", "size", "stride"}
# An operation does not take fewer examples as they are read.
_WHAT_MEANS_THAT_IT_CANNOT_BE = (RuntimeError, ValueError, IndexError, TypeError, KeyError, ZeroDivisionError)


@dataclass(kw_only=True)
class _Root:
    """A tensor with which following begins.

    Attributes:
        followed: what the user is given.
        original: its value, safe from writes in place: either it is another tensor, or it is copied at first use.
        shared: whether `followed` still holds the same numbers in memory.
        axis: of the batch.
        is_output: whether the model computed it; otherwise it is part of the batch.
    """

    followed: Tensor
    original: Tensor
    shared: bool
    axis: int
    is_output: bool

    def keep(self) -> None:
        """Copy the value, before anybody can write to it."""
        if self.shared:
            self.original, self.shared = self.original.clone(), False


@dataclass(frozen=True, kw_only=True)
class _Call:
    """An operation on followed tensors.

    Attributes:
        results: the tensors that it returned.
        number: the Python number that it returned, if it returned one.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    results: list[Tensor]
    number: float | None

    @property
    def writes_in_place(self) -> bool:
        """Whether it changes its first argument."""
        name = getattr(self.function, "__name__", "")
        return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


class LossTrace:
    """Follows a batch and the outputs computed from it to the loss.

    Args:
        batch_size: N >= 2.
        loss_reduction: what was declared.
        on_checked: called at the end with whether there was a loss, and each could be computed for fewer examples.

    Raises (from `backward()` of a loss computed from what is followed):
        LossError: the loss is not what was declared.
    """

    def __init__(self, *, batch_size: int, loss_reduction: LossReduction, on_checked: Callable[[bool], None]) -> None:
        self.batch_size = batch_size
        self._reduction = loss_reduction
        self._on_checked = on_checked
        self._roots: list[_Root] = []
        self._calls: list[_Call] = []
        self._done = False
        self._confirmed: list[bool] = []
        self._passes = 0

    def follow_batch(self, batch: Any) -> Any:
        """The same tree, with the tensors followed that carry the examples on their first axis."""

        def follow(leaf: Any) -> Any:
            carries = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.batch_size
            return self._root(leaf, axis=0, is_output=False) if carries else leaf

        return tree_map(follow, batch)

    def begin_pass(self) -> None:
        """The outputs followed next come from another forward pass."""
        self._passes += 1

    def follow_output(self, output: Tensor, *, axis: int) -> Tensor:
        """A differentiable output of the model, followed."""
        return self._root(output, axis=axis, is_output=True)

    def _root(self, tensor: Tensor, *, axis: int, is_output: bool) -> Tensor:
        # An alias of a custom function's output could not be written to in place. What comes with the batch may be
        # large, and is often used by the model alone: that is not copied.
        followed = self._follow(tensor.clone() if is_output else tensor)
        root = _Root(followed=followed, original=tensor.detach(), shared=not is_output, axis=axis, is_output=is_output)
        self._roots.append(root)
        return followed

    def _follow(self, tensor: Tensor) -> Tensor:
        followed = tensor.as_subclass(_Followed)
        followed._trace = self
        return followed

    def before(self, args: Any, kwargs: Any) -> None:
        """A call may write to its arguments."""
        used = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Followed)}
        for root in self._roots:
            if id(root.followed) in used:
                root.keep()

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> Any:
        """Remember a call, and follow the tensors that it returns."""
        if self._done:
            return result
        result = tree_map(lambda leaf: self._follow(leaf) if isinstance(leaf, Tensor) else leaf, result)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        number = result if type(result) in (int, float) else None
        call = _Call(function=function, args=args, kwargs=kwargs, results=results, number=number)
        if results or number is not None or call.writes_in_place:
            self._calls.append(call)
        return result

    def check(self, loss: Tensor) -> None:
        """Compare the whole loss with that of half of the examples; runs before each backward."""
        if self._done:
            return
        _refuse_outside_parameters(loss)
        possible = self._possible(loss)
        if possible:
            _refuse_other_than(self._reduction, possible, size=self.batch_size)
        self._confirmed.append(bool(possible))

    def end(self) -> None:
        """Follow nothing any longer, and let go of all that was followed."""
        if self._done:
            return
        self._done = True
        self._roots.clear()
        self._calls.clear()
        if self._confirmed:
            self._on_checked(all(self._confirmed))

    def _possible(self, loss: Tensor) -> set[Verdict]:
        """What the loss may be, by the readings in which it can be computed."""
        size, half = self.batch_size, (self.batch_size + 1) // 2
        calls = self._calls_behind(loss)
        reads_numbers = any(call.number is not None for call in calls)
        axes = [root.axis for root in self._roots if root.is_output]
        try:
            whole = self._output_gradients(loss, calls, size, None)  # the same in every reading
        except _WHAT_MEANS_THAT_IT_CANNOT_BE:
            return set()
        rows = [gradient.narrow(axis, 0, half) for gradient, axis in zip(whole, axes, strict=True)]
        possible: set[Verdict] = set()
        tried: set[object] = set()
        for reading in READINGS if self._passes <= 1 else READINGS_OF_SEVERAL:
            if possible and not reading.items and reads_numbers:
                break  # numbers read from tensors were recognised: that reading is the one
            with torch._C.DisableTorchFunctionSubclass():  # to look at tensors is no part of the loss
                substitutions = (reading.items and reads_numbers, *self._substitutions(calls, half, reading))
            if substitutions in tried:
                continue  # nothing in this loss tells it from an earlier one
            tried.add(substitutions)
            try:
                part = self._output_gradients(loss, calls, half, reading)
            except _WHAT_MEANS_THAT_IT_CANNOT_BE:
                continue  # read like this, the loss cannot be computed for fewer examples
            relation = relation_of(rows, part, size=size, half=half)
            if relation is not None:
                possible.add(relation)
        return possible

    def _substitutions(self, calls: list[_Call], rows: int, reading: Reading) -> list[object]:
        """What a reading puts in place of what is not followed, in order."""
        known = {id(root.followed) for root in self._roots}
        found: list[object] = []
        for call in calls:
            for leaf in tree_leaves((call.args, call.kwargs)):
                if type(leaf) in (int, float):
                    found.append(reading.number(leaf, self.batch_size, rows))
                elif isinstance(leaf, Tensor) and leaf.ndim and id(leaf) not in known:
                    found.append(reading.kept(leaf.shape[0], self.batch_size, rows))
            known.update(id(result) for result in call.results)
        return found

    def _calls_behind(self, loss: Tensor) -> list[_Call]:
        """The calls that the loss, or a number read from a tensor, depends on; in order."""
        needed = {id(loss)}
        behind = []
        for call in reversed(self._calls):
            inputs = [id(leaf) for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, _Followed)]
            wanted = any(id(result) in needed for result in call.results) or call.number is not None
            if wanted or (call.writes_in_place and inputs and inputs[0] in needed):
                behind.append(call)
                needed.update(inputs)
        return behind[::-1]

    def _output_gradients(self, loss: Tensor, calls: list[_Call], rows: int, reading: Reading | None) -> list[Tensor]:
        """Gradients of the loss with respect to the outputs of the first `rows` examples alone.

        Args:
            reading: what follows the batch; None where all examples are taken.
        """
        starts: list[Tensor] = []
        known: dict[int, Tensor] = {}
        numbers: dict[float, float] = {}
        roots = {id(root.followed): root for root in self._roots if not root.is_output}

        def substitute(leaf: Any) -> Any:
            if type(leaf) in (int, float):
                if reading is None:
                    return leaf
                known_number = numbers.get(leaf) if reading.items else None
                return reading.number(leaf, self.batch_size, rows) if known_number is None else known_number
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in known:
                return known[id(leaf)]
            if (root := roots.get(id(leaf))) is not None:
                known[id(leaf)] = root.original.narrow(root.axis, 0, rows).clone()
                return known[id(leaf)]
            # A copy: the loss may also write to tensors of its own, which must not happen twice.
            copy = untraced(leaf).detach().clone()
            return copy if reading is None or not copy.ndim else reading.rows_of(copy, self.batch_size, rows)

        device = self._roots[0].original.device
        with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad(), isolated_randomness(device):
            for root in self._roots:
                if root.is_output:
                    starts.append(root.original.narrow(root.axis, 0, rows).requires_grad_())
                    known[id(root.followed)] = starts[-1] * 1  # the loss may write to it in place
            for call in calls:
                again = call.function(*tree_map(substitute, call.args), **tree_map(substitute, call.kwargs))
                if call.number is not None:
                    numbers[call.number] = again
                fresh = [leaf for leaf in tree_leaves(again) if isinstance(leaf, Tensor)]
                known.update({id(old): new for old, new in zip(call.results, fresh, strict=True)})
            found = torch.autograd.grad(known[id(loss)], starts, allow_unused=True)
        return [torch.zeros_like(s) if g is None else g for s, g in zip(starts, found, strict=True)]


def _refuse_outside_parameters(loss: Tensor) -> None:
    """Raise if the loss has parameters that the private model does not.

    Raises:
        LossError: naming their shapes; they would be trained on private data without noise.
    """
    shapes, seen, ahead = [], set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen or node.name() == "_BoundaryBackward":
            continue  # beyond the boundary is the private model
        seen.add(node)
        if hasattr(node, "variable"):
            shapes.append(tuple(node.variable.shape))
        ahead.extend(parent for parent, _ in node.next_functions)
    if shapes:
        raise LossError(
            f"The loss depends on tensors outside of the private model that require a gradient, of shapes {shapes}: "
            "they would be trained on private data without clipping or noise. Make them part of the model before "
            "make_private, or detach() them."
        )


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
        """Carry out the operation on plain tensors, and remember it."""
        kwargs = kwargs or {}
        followed = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Followed))
        trace = next((leaf._trace for leaf in followed if hasattr(leaf, "_trace")), None)
        if func is Tensor.backward and trace is not None:
            trace.check(args[0])
        asks = getattr(func, "__name__", "") in _ASKING
        if trace is not None and not asks:
            trace.before(args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if trace is not None and asks and isinstance(result, Tensor):
            trace.before(args, kwargs)  # a property that is a tensor: by it the memory may be written to
        if trace is None or func is Tensor.backward:
            return result
        return trace.record(func, args, kwargs, result)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return untraced(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = copy.deepcopy(untraced(self), memo)
        return copied


def untraced(value: Any) -> Any:
    """A followed tensor as a plain one; anything else as it is."""
    return value.as_subclass(Tensor) if isinstance(value, _Followed) else value
