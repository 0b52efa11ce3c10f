"""Where a tensor carries the examples, and how to bring them to the front.

An axis that carries N examples has N * k rows, k of them an example's (k = 1 mostly; windows of an image or the
flattened steps of a sequence give more). Either an example's rows lie together ("example" major), or row r belongs
to example r % N ("inner" major, as after flattening [T, N, ...]).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["BatchAxis", "RowOrder"]

RowOrder = Literal["example", "inner"]


@dataclass(frozen=True, kw_only=True)
class BatchAxis:
    """The axis of a tensor that carries the examples.

    Attributes:
        position: which axis.
        order: which index runs slower where an example has several rows.
        each: an example's rows, where they were counted.
    """

    position: int
    order: RowOrder = "example"
    each: int | None = None

    def fits(self, tensor: Tensor, examples: int) -> bool:
        """Whether `tensor` can carry `examples` on this axis."""
        rows = tensor.shape[self.position]
        return rows % examples == 0 if self.each is None else rows == self.each * examples

    def to_front(self, tensor: Tensor, examples: int) -> Tensor:
        """[..., N * k, ...] as [N, k, ...], the other axes in their order. A view where torch can make one."""
        moved = tensor.movedim(self.position, 0) if self.position else tensor
        if moved.shape[0] == examples:
            return moved.unsqueeze(1)
        sizes = (examples, -1) if self.order == "example" else (-1, examples)
        front: Tensor = moved.unflatten(0, sizes)
        return front if self.order == "example" else front.transpose(0, 1)

    def from_front(self, tensor: Tensor) -> Tensor:
        """The inverse of `to_front`."""
        moved = tensor if self.order == "example" else tensor.transpose(0, 1)
        moved = moved.flatten(0, 1)
        return moved.movedim(0, self.position) if self.position else moved
