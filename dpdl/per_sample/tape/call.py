"""One torch call that involves parameters, named so that the same call is recognised in every forward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from dpdl.per_sample.tape.source import Source

__all__ = ["Call", "CallNames", "FirstUses", "by_position", "involved_sources", "tensors_in"]


class Call:
    """A call of a torch function.

    Attributes:
        function: what torch calls.
        args, kwargs: its arguments.
        sources: those of its operands that depend on parameters alone, in order.
        name: the same for the same call in every forward pass.
    """

    __slots__ = ("args", "function", "kwargs", "name", "sources")

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sources: list[Source],
        name: Hashable,
    ) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.sources = sources
        self.name = name

    def __str__(self) -> str:
        names = dict.fromkeys(name for source in self.sources for name in source.parameters)
        return f"{getattr(self.function, '__name__', self.function)} of {', '.join(names)}"


class CallNames:
    """Names calls by their function, the sources that they use, and how often that has happened before.

    The position in the whole sequence of calls would not do: a layer that is skipped now and then (layer drop) would
    rename all that follow.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, int] = {}

    def name(self, function: Callable[..., Any], sources: list[Source]) -> Hashable:
        """A name for the next call of `function` with these sources."""
        use = (function, *[source.key for source in sources])
        count = self._seen.get(use, 0)
        self._seen[use] = count + 1
        return (*use, count)


class FirstUses(CallNames):
    """Takes every use for the first of its kind."""

    def name(self, function: Callable[..., Any], sources: list[Source]) -> Hashable:
        """A name for a call of `function` with these sources."""
        return (function, *[source.key for source in sources], 0)


# Torch's names of what rules take by position.
_POSITIONS: dict[str, tuple[str, ...]] = {
    "add": ("input", "other"),
    "add_": ("input", "other"),
    "addmm": ("input", "mat1", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
    "bmm": ("input", "mat2"),
    "index_select": ("input", "dim", "index"),
    "matmul": ("input", "other"),
    "mm": ("input", "mat2"),
    "mul": ("input", "other"),
    "mul_": ("input", "other"),
    "rsub": ("input", "other"),
    "sub": ("input", "other"),
}


def by_position(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with those at hand that torch lets callers name, by position."""
    names = _POSITIONS.get(getattr(function, "__name__", ""), ()) if kwargs else ()
    rest = dict(kwargs)
    placed = list(args)
    for name in names[len(args) :]:
        if name not in rest:
            break
        placed.append(rest.pop(name))
    return tuple(placed), rest


def tensors_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among a call's arguments, in order."""
    return [leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, Tensor)]


def involved_sources(args: tuple[Any, ...], kwargs: Mapping[str, Any], sources: Mapping[int, Source]) -> list[Source]:
    """The sources among a call's arguments, in order; quick where there are none."""
    found = []
    for value in args:
        if id(value) in sources:
            found.append(sources[id(value)])
        elif type(value) in (list, tuple, dict):
            found.extend(sources[id(leaf)] for leaf in tree_leaves(value) if id(leaf) in sources)
    for value in kwargs.values():
        if id(value) in sources:
            found.append(sources[id(value)])
        elif type(value) in (list, tuple, dict):
            found.extend(sources[id(leaf)] for leaf in tree_leaves(value) if id(leaf) in sources)
    return found


def _leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        if type(value) in (list, tuple, dict):
            yield from tree_leaves(value)
        else:
            yield value
