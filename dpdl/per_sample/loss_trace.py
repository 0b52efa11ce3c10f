"""Checks that a loss is the mean or sum over examples that it is declared to be, by running it again.

On some batches the tensors of the batch, and the model's outputs, remember the operations that are applied
to them, up to the step. At each `backward()` the loss is computed again from these, for other examples
(`loss_replay.py`), and judged by the gradients of the outputs (`loss_verdict.py`). The outputs may come from several
forward passes over the batch.

What leaves followed tensors as numpy arrays, lists or Python numbers comes back, if it does, as constants that
nothing connects to the examples. Such a loss is confirmed only if its constants come again on another batch
(`loss_constants.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dpdl.errors import LossError
from dpdl.execution import LossReduction
from dpdl.per_sample.loss_constants import Constants
from dpdl.per_sample.loss_relation import Verdict
from dpdl.per_sample.loss_replay import Call, Mode, Replay, Root, numbers_in
from dpdl.per_sample.loss_verdict import judge
from dpdl.per_sample.randomness import RandomState

__all__ = ["LossChecks", "LossTrace", "untraced"]

# What only asks a tensor for its form. Everything else may write to it.
_ASKING = {
    *("__get__", "__len__", "dim", "element_size", "is_complex", "is_contiguous", "is_floating_point", "nelement"),
    *("ndimension", "numel", "size", "stride"),
}
# What hands out a tensor's numbers, or the memory that holds them.
_LETTING_OUT = {"__array__", "__dlpack__", "data_ptr", "numpy", "storage", "tolist", "untyped_storage"}


class LossChecks:
    """What the checks of one run's losses have found, batch after batch.

    Args:
        loss_reduction: what was declared.
        on_untold: called where a loss could not be run again at all.
    """

    def __init__(self, loss_reduction: LossReduction, *, on_untold: Callable[[], None]) -> None:
        self.loss_reduction = loss_reduction
        self.on_untold = on_untold
        self.confirmed_sizes: set[int] = set()
        self._constants: list[list[Constants]] = []

    def confirmed(self, size: int) -> None:
        """All losses of a batch were what was declared."""
        self.confirmed_sizes.add(size)

    def have_come_before(self, constants: list[Constants]) -> bool:
        """Whether the losses of an earlier batch, of another size, had these constants; they are remembered."""
        before = any(
            len(constants) == len(earlier)
            and all(one.come_again_in(another) for one, another in zip(constants, earlier, strict=True))
            for earlier in self._constants
        )
        self._constants.append(constants)
        return before


class LossTrace:
    """Follows a batch and the outputs computed from it to the loss.

    Args:
        batch_size: N >= 2.
        turn: the number of the batch.
        checks: told at the end if there was a loss, and each was found to be what was declared.

    Raises (from `backward()` of a loss computed from what is followed):
        LossError: the loss is not what was declared.
    """

    def __init__(self, *, batch_size: int, turn: int, checks: LossChecks) -> None:
        self.batch_size = batch_size
        self._turn = turn
        self._checks = checks
        self._roots: list[Root] = []
        self._calls: list[Call] = []
        self._done = False
        self._confirmed: list[bool] = []
        self._constants: list[Constants] = []
        self._passes = 0
        self._has_let_out = False
        self._has_hooks = False
        self._device = torch.device("cpu")  # of the latest that is followed: an output's, once there is one

    def follow_batch(self, batch: Any) -> Any:
        """The same tree, with its tensors followed: those with the examples on their first axis, and others."""

        def follow(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.ndim:
                return leaf
            # What comes with the batch may be large, and is often used by the model alone: that is not copied.
            axis = 0 if leaf.shape[0] == self.batch_size else None
            return self._root(leaf, None, leaf.detach(), axis=axis, shared=True)

        return tree_map(follow, batch)

    def begin_pass(self) -> None:
        """The outputs followed next come from another forward pass."""
        self._passes += 1

    def follow_output(self, output: Tensor, *, axis: int) -> Tensor:
        """A differentiable output of the model, followed."""
        # An alias of a custom function's output could not be written to in place.
        source = output if output.requires_grad else None
        return self._root(output.clone(), source, output.detach(), axis=axis, shared=False)

    def _root(
        self, tensor: Tensor, source: Tensor | None, original: Tensor, *, axis: int | None, shared: bool
    ) -> Tensor:
        followed = self._follow(tensor)
        self._device = tensor.device
        self._roots.append(Root(followed=followed, source=source, original=original, shared=shared, axis=axis))
        return followed

    def _follow(self, tensor: Tensor) -> Tensor:
        followed = tensor.as_subclass(_Followed)
        followed._trace = self
        return followed

    def random_state(self) -> RandomState:
        """Where torch's random numbers are now."""
        return RandomState(self._device)

    def before(self, args: Any, kwargs: Any) -> None:
        """A call may write to its arguments."""
        used = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Followed)}
        for root in self._roots:
            if id(root.followed) in used:
                root.keep()

    def meet_hook(self) -> None:
        """A hook may change gradients on their way to the model, and is not run again: nothing can be confirmed."""
        self._has_hooks = True

    def record(
        self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any, drawn_from: RandomState | None
    ) -> Any:
        """Remember a call, and follow the tensors that it returns.

        Args:
            drawn_from: the random state before, if the call drew from it. Where no gradient passes, what it returns
                is then a constant, as any that a loss draws.
        """
        if self._done:
            return result
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        numbers = numbers_in(result)
        self._has_let_out |= getattr(function, "__name__", "") in _LETTING_OUT
        if drawn_from is not None and tensors and not any(tensor.requires_grad for tensor in tensors):
            return result
        result = tree_map(lambda leaf: self._follow(leaf) if isinstance(leaf, Tensor) else leaf, result)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        mode = Mode.now(self._device)
        call = Call(
            function=function,
            args=args,
            kwargs=kwargs,
            results=results,
            numbers=numbers,
            mode=mode,
            drawn_from=drawn_from,
        )
        if results or numbers or call.writes_in_place:
            self._calls.append(call)
        return result

    def check(self, loss: Tensor) -> None:
        """Compute the loss again; runs before each backward."""
        if self._done:
            return
        _refuse_outside_parameters(loss)
        if not loss.requires_grad:
            return  # torch will say so
        replay = Replay(loss, self._roots, self._calls, size=self.batch_size)
        judgement = judge(replay, turn=self._turn, several=self._passes > 1)
        if judgement.verdict is not None:
            _refuse_other_than(self._checks.loss_reduction, judgement.verdict, size=self.batch_size)
        if not judgement.has_run or self._has_hooks:
            self._checks.on_untold()
        self._confirmed.append(judgement.verdict is not None and not self._has_hooks)
        if self._has_let_out or not replay.numbers_stay:
            with torch._C.DisableTorchFunctionSubclass():
                self._constants.append(Constants(replay.outside(), size=self.batch_size))

    def end(self) -> None:
        """Follow nothing any longer, and let go of all that was followed."""
        if self._done:
            return
        self._done = True
        self._roots.clear()
        self._calls.clear()
        known = not self._constants or self._checks.have_come_before(self._constants)
        if self._confirmed and all(self._confirmed) and known:
            self._checks.confirmed(self.batch_size)


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


def _refuse_other_than(declared: LossReduction, actual: Verdict, *, size: int) -> None:
    """Raise unless the loss is what was declared.

    Raises:
        LossError: saying what the loss is instead.
    """
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


def _scalar_of(loss: Tensor, gradient: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """What `loss.backward(gradient)` is the backward of."""
    return loss if gradient is None else (loss * gradient).sum()


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
            trace.check(_scalar_of(*args, **kwargs))
        if func is Tensor.register_hook and trace is not None:
            trace.meet_hook()
        asks = getattr(func, "__name__", "") in _ASKING
        if trace is not None and not asks:
            trace.before(args, kwargs)
        before = trace.random_state() if trace is not None and not asks else None
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if trace is not None and asks and isinstance(result, Tensor):
            trace.before(args, kwargs)  # a property that is a tensor: by it the memory may be written to
        if trace is None or func is Tensor.backward:
            return result
        drawn_from = before if before is not None and before.has_moved() else None
        return trace.record(func, args, kwargs, result, drawn_from)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return untraced(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = copy.deepcopy(untraced(self), memo)
        return copied


def untraced(value: Any) -> Any:
    """A followed tensor as a plain one; anything else as it is."""
    return value.as_subclass(Tensor) if isinstance(value, _Followed) else value
