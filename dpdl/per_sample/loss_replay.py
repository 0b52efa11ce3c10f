"""A loss computed again from the operations that led to it, for some of the examples or with others in their place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dpdl.per_sample.loss_reading import Reading, may_be_recognised
from dpdl.per_sample.randomness import RandomState, isolated_randomness

__all__ = ["Call", "Mode", "Replay", "Root", "numbers_in"]

# An operation does not take other examples as they are read.
_WHAT_MEANS_THAT_IT_CANNOT_BE = (RuntimeError, ValueError, IndexError, TypeError, KeyError, ZeroDivisionError)


@dataclass(kw_only=True, eq=False)
class Root:
    """A tensor with which following begins.

    Attributes:
        followed: what the user is given.
        source: the model's output, from which `followed` was made; None for what is part of the batch, or was
            computed without a graph.
        original: its value, safe from writes in place: either it is another tensor, or it is copied at first use.
        shared: whether `followed` still holds the same numbers in memory.
        axis: of the batch; None for what came with the batch in another form, such as all examples' labels one
            after another.
    """

    followed: Tensor
    source: Tensor | None
    original: Tensor
    shared: bool
    axis: int | None

    def keep(self) -> None:
        """Copy the value, before anybody can write to it."""
        if self.shared:
            self.original, self.shared = self.original.clone(), False


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How torch was set when an operation ran.

    Attributes:
        gradients: whether a graph was built.
        autocast: the dtype in which autocast computed on the device; None without it.
    """

    gradients: bool
    autocast: torch.dtype | None

    @classmethod
    def now(cls, device: torch.device) -> Mode:
        """As it is set."""
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return cls(gradients=torch.is_grad_enabled(), autocast=autocast)

    @contextmanager
    def restored(self, device: torch.device) -> Iterator[None]:
        """Inside, as it was set."""
        casting = torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)
        with torch.set_grad_enabled(self.gradients), casting:
            yield


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """An operation on followed tensors.

    Attributes:
        results: the tensors that it returned.
        numbers: the Python numbers that it returned; a form's lengths too.
        mode: under which it ran.
        drawn_from: the random state that it ran from, if it drew from it.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    results: list[Tensor]
    numbers: tuple[float, ...]
    mode: Mode
    drawn_from: RandomState | None

    @property
    def writes_in_place(self) -> bool:
        """Whether it changes its first argument."""
        name = getattr(self.function, "__name__", "")
        return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))

    @property
    def leaves(self) -> list[Any]:
        """Its arguments."""
        return tree_leaves((self.args, self.kwargs))


class Replay:
    """A loss, and all that it was computed from.

    Args:
        loss: a scalar.
        roots: what was followed.
        calls: all operations on what was followed, in order.
        size: N.

    Attributes:
        behind: the operations that the loss depends on, in order.
        reads_numbers: whether numbers that may be recognised were read from followed tensors.
        numbers_stay: whether all Python numbers that were read from followed tensors were the same for other
            examples, or in proportion to how many they are; None where that was not seen.
    """

    def __init__(self, loss: Tensor, roots: Sequence[Root], calls: Sequence[Call], *, size: int) -> None:
        self.size = size
        self._loss = loss
        self._roots = roots
        self._outputs = [root for root in roots if root.source is not None]
        self._device = roots[-1].original.device
        self.behind = _behind(loss, calls, numbers=False)
        self._needed = {id(call) for call in self.behind}
        self._calls = _behind(loss, calls, numbers=True)
        self.reads_numbers = any(may_be_recognised(n, size) for call in self._calls for n in call.numbers)
        self.numbers_stay: bool | None = None

    @property
    def draws(self) -> bool:
        """Whether random numbers were drawn on the way: for fewer examples, they would be others."""
        return any(call.drawn_from is not None for call in self.behind)

    @property
    def takes_lists(self) -> bool:
        """Whether the loss takes data of the batch that are not one row an example.

        They may follow the first examples, but no others, and not examples in others' places.
        """
        lists = {id(root.followed) for root in self._roots if root.axis is None}
        return any(id(leaf) in lists for call in self.behind for leaf in call.leaves)

    def outside(self) -> Iterator[Any]:
        """What enters the loss besides what is known to follow, in order: numbers, tensors, and the operations."""
        known = {id(root.followed) for root in self._roots if root.axis is not None}
        for call in self.behind:
            yield call.function
            for leaf in call.leaves:
                if not isinstance(leaf, Tensor) or id(leaf) not in known:
                    yield leaf
            known.update(id(result) for result in call.results)

    def true_gradients(self) -> list[Tensor]:
        """With respect to all outputs, by autograd."""
        sources = [root.source for root in self._outputs if root.source is not None]
        with torch._C.DisableTorchFunctionSubclass():
            loss = self._loss.as_subclass(Tensor)
            found = torch.autograd.grad(loss, sources, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(s) if g is None else g for s, g in zip(sources, found, strict=True)]

    def at(self, gradients: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """What gradients with respect to all outputs are for some of the examples."""
        pairs = zip(gradients, self._outputs, strict=True)
        return [_rows_along(root.axis, gradient, rows) for gradient, root in pairs]

    def effects(self, reading: Reading, part: int) -> Hashable:
        """What a reading puts in place of what is not followed: readings with equal effects are the same."""
        found: list[Hashable] = [reading.items and self.reads_numbers]
        with torch._C.DisableTorchFunctionSubclass():  # to look at tensors is no part of the loss
            for leaf in self.outside():
                if type(leaf) in (int, float):
                    found.append(reading.number(leaf, self.size, part))
                elif isinstance(leaf, Tensor) and leaf.ndim:
                    found.append(reading.effect_on(leaf, self.size))
        return tuple(found)

    def gradients(self, rows: Tensor, reading: Reading | None) -> list[Tensor] | None:
        """Gradients of the loss with respect to the outputs, were the examples of the batch those numbered by `rows`.

        Args:
            rows: any number of them, in any order; also repeatedly.
            reading: what follows the batch; None where the batch is as it was.

        Returns:
            None where the loss, read like this, cannot be computed.
        """
        try:
            return self._gradients(rows, reading)
        except _WHAT_MEANS_THAT_IT_CANNOT_BE:
            return None

    def _gradients(self, rows: Tensor, reading: Reading | None) -> list[Tensor]:
        starts: list[Tensor] = []
        known: dict[int, Tensor] = {}
        numbers: dict[float, float] = {}
        stay = True
        roots = {id(root.followed): root for root in self._roots if root.source is None}

        def substitute(leaf: Any) -> Any:
            if type(leaf) in (int, float):
                if reading is None:
                    return leaf
                known_number = numbers.get(leaf) if reading.recognises(leaf, self.size) else None
                return reading.number(leaf, self.size, len(rows)) if known_number is None else known_number
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in known:
                return known[id(leaf)]
            root = roots.get(id(leaf))
            if root is not None and root.axis is not None:
                known[id(leaf)] = _rows_along(root.axis, root.original, rows)
                return known[id(leaf)]
            # A copy: the loss may also write to tensors of its own, which must not happen twice.
            copy = (leaf.as_subclass(Tensor).detach() if root is None else root.original).clone()
            copy = copy if reading is None or not copy.ndim else reading.rows_of(copy, self.size, rows)
            if root is not None:
                known[id(leaf)] = copy
            return copy

        with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad(), isolated_randomness(self._device):
            for root in self._outputs:
                starts.append(_rows_along(root.axis, root.original, rows).requires_grad_())
                known[id(root.followed)] = starts[-1] * 1  # the loss may write to it in place
            for call in self._calls:
                try:
                    again = self._call_again(call, substitute)
                except _WHAT_MEANS_THAT_IT_CANNOT_BE:
                    if id(call) in self._needed:
                        raise
                    stay = False
                    continue  # only a number was read from it
                fresh_numbers = numbers_in(again)
                pairs = list(zip(call.numbers, fresh_numbers, strict=True))
                stay &= all(new in (old, old / self.size * len(rows)) for old, new in pairs)
                numbers.update(pairs)
                fresh = [leaf for leaf in tree_leaves(again) if isinstance(leaf, Tensor)]
                known.update({id(old): new for old, new in zip(call.results, fresh, strict=True)})
            found = torch.autograd.grad(known[id(self._loss)], starts, allow_unused=True)
        if reading is not None:
            self.numbers_stay = stay and self.numbers_stay is not False
        return [torch.zeros_like(s) if g is None else g for s, g in zip(starts, found, strict=True)]

    def _call_again(self, call: Call, substitute: Callable[[Any], Any]) -> Any:
        """What an operation returns for other arguments, as torch was set when it ran."""
        args, kwargs = tree_map(substitute, call.args), tree_map(substitute, call.kwargs)
        with ExitStack() as stack:
            stack.enter_context(call.mode.restored(self._device))
            if call.drawn_from is not None:
                stack.enter_context(call.drawn_from.replayed())
            # What torch says of some other number of examples is not for the user.
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            return call.function(*args, **kwargs)


def numbers_in(result: Any) -> tuple[float, ...]:
    """The Python numbers that an operation has returned: one, or the lengths of a form."""
    if isinstance(result, torch.Size):
        return tuple(result)
    return (result,) if type(result) in (int, float, bool) else ()


def _rows_along(axis: int | None, tensor: Tensor, rows: Tensor) -> Tensor:
    assert axis is not None
    return tensor.index_select(axis, rows.to(tensor.device))


def _behind(loss: Tensor, calls: Sequence[Call], *, numbers: bool) -> list[Call]:
    """The calls that the loss (and, if asked for, a number read from a tensor) depends on; in order."""
    needed = {id(loss)}
    behind = []
    for call in reversed(calls):
        inputs = [id(leaf) for leaf in call.leaves if isinstance(leaf, Tensor)]
        wanted = any(id(result) in needed for result in call.results) or (numbers and bool(call.numbers))
        if wanted or (call.writes_in_place and inputs and inputs[0] in needed):
            behind.append(call)
            needed.update(inputs)
    return behind[::-1]
