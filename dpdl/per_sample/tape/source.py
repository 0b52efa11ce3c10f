"""Tensors that depend on parameters alone: the parameters themselves, and what is derived from them.

A contribution belongs to a source. To reach the parameters it is pulled back through the operations that derived
the source: once for a weighted sum (the pull-back is linear), for each example where norms are asked for. Where the
derivation only moves numbers about (a transpose, a slice), norms are those of the source and nothing is pulled back.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Source", "disjoint", "moved_within"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """A tensor that depends on parameters alone.

    Attributes:
        key: names it, the same in every forward pass: the parameter's name, or how it was derived.
        tensor: the tensor with its graph. Held, because identities are only good while tensors live.
        parameters: names of the parameters that it depends on.
        moved: whether it is one parameter, or an arrangement of distinct numbers of one.
        version: the tensor's version counter when this was made.
        rounded: whether half precision was used on the way from the parameters. The way back rounds too, which must
            happen to each example's gradient, before norms are taken, and not to their sum.
    """

    key: Hashable
    tensor: Tensor
    parameters: tuple[str, ...]
    moved: bool
    version: int
    rounded: bool = False

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was written to it since it was made."""
        return self.tensor._version == self.version

    @property
    def constant(self) -> Tensor:
        """The same values without a graph, as they are now."""
        return self.tensor.detach()

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter itself."""
        return self.tensor.is_leaf


# Operations whose result holds numbers of their first argument, each at most once, and nothing else.
_MOVING = {
    "T", "mT", "chunk", "clone", "contiguous", "flatten", "movedim", "moveaxis", "narrow", "permute", "reshape",
    "reshape_as", "select", "split", "split_with_sizes", "squeeze", "swapaxes", "t", "tensor_split", "transpose",
    "unbind", "unflatten", "unsqueeze", "view", "view_as",
}  # fmt: skip


def moved_within(function: object, parents: Iterable[Source], result: Tensor) -> bool:
    """Whether `result` is only an arrangement of distinct numbers of its one parent, which is so itself."""
    first, *more = parents
    if more or not first.moved or result.dtype != first.tensor.dtype or result.numel() > first.tensor.numel():
        return False
    getter = getattr(function, "__self__", None)  # a property, T or mT
    name = getattr(getter if hasattr(getter, "__name__") else function, "__name__", "")
    if name == "__getitem__":
        return result._is_view() and result._base is _base(first.tensor)  # slices, not gathered rows
    return name in _MOVING


def _base(tensor: Tensor) -> Tensor:
    base = tensor._base
    return tensor if base is None else base


def disjoint(sources: list[Source], parameters: Mapping[str, Tensor]) -> bool:
    """Whether arrangements of one parameter's numbers have no number in common."""
    if len(sources) == 1:
        return True
    parameter = parameters[sources[0].parameters[0]]
    if sum(source.tensor.numel() for source in sources) > parameter.numel():
        return False
    used = torch.zeros_like(parameter)
    for source in sources:
        if source.is_parameter:
            return False
        ones = torch.ones_like(source.tensor)
        used += torch.autograd.grad(source.tensor, parameter, ones, retain_graph=True)[0]
    return bool((used <= 1).all())
