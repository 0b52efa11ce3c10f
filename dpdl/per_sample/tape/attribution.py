"""Whose gradient is whose, seen on the batch itself.

A plan is found on a few examples; whether it holds for a batch may depend on the data (rows that are sorted, selected
or gathered by it, a branch that was not taken before). So the way back is gone twice where that is not known: first
with each example's loss multiplied by a number of its own. Gradients are linear in the loss. What the tape takes for
example n's contribution must therefore come multiplied by exactly example n's number; anything of another example in
it has another factor. The numbers are powers of two, by which floating point multiplies without rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dpdl.per_sample.tape.refusal import TapeRefusal

__all__ = ["Rehearsal", "may_move_rows"]

FACTORS = 16  # 1, 1/2, ..., 2^-15, drawn for each example
FACTORS_IN_HALF_PRECISION = 4  # float16 ends at 2^-24
# Norms of the two passes may differ by rounding in the margin of Gram norms; another example's factor is 2 at least.
TOLERANCE = 0.05

# Squared norms below this have lost their digits in float32.
UNDERFLOW = 1e-30

# Torch functions that may put rows in places, or leave rows out, that depend on the data.
_MOVING = {
    "argsort", "argwhere", "gather", "index_add", "index_add_", "index_copy", "index_copy_", "index_put", "index_put_",
    "index_select", "kthvalue", "masked_scatter", "masked_scatter_", "masked_select", "msort", "nonzero",
    "repeat_interleave", "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_",
    "sort", "take", "take_along_dim", "topk", "unique", "unique_consecutive",
}  # fmt: skip


# Those that take a tensor apart along one axis, the first unless told otherwise.
_DIVIDING = {"__iter__", "chunk", "split", "split_with_sizes", "tensor_split", "unbind"}


def may_move_rows(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], examples: int
) -> bool:
    """Whether a call may rearrange or select rows of a batch by the data."""
    name = getattr(function, "__name__", "")
    if name in _DIVIDING:
        sizes = args[0].shape if isinstance(args[0], Tensor) else ()
        axis = kwargs.get("dim", args[-1] if len(args) > (1 if name == "unbind" else 2) else 0)
        return bool(sizes) and isinstance(axis, int) and sizes[axis] > 0 and sizes[axis] % examples == 0
    if name == "__getitem__":
        indices = args[1] if isinstance(args[1], tuple) else (args[1],)
        first = args[0].shape[0] if isinstance(args[0], Tensor) and args[0].ndim else 0
        if isinstance(indices[0], int) and first and first % examples == 0:
            return True
        if not any(isinstance(index, (Tensor, list)) for index in indices):
            return False
    elif name not in _MOVING:
        return False
    tensor = args[0] if args else None
    return not isinstance(tensor, Tensor) or any(size and size % examples == 0 for size in tensor.shape)


class Rehearsal:
    """Compares what arrives in two passes of one way back.

    Args:
        examples: N.
        round_number: makes another assignment of numbers to examples.
        half_precision: whether float16 is on the way.
    """

    def __init__(self, examples: int, round_number: int, *, half_precision: bool) -> None:
        generator = torch.Generator().manual_seed(round_number)
        count = FACTORS_IN_HALF_PRECISION if half_precision else FACTORS
        self.factors = torch.pow(2.0, -torch.randint(count, (examples,), generator=generator).double())
        self._rehearsed: list[Tensor] = []
        self._compared: int | None = None

    def scaled(self, cotangent: Tensor, axis: int | None) -> Tensor:
        """A gradient of an output, each example's part multiplied by its number."""
        factors = self.factors.to(cotangent.device, cotangent.dtype)
        return cotangent * factors.view([-1 if i == (axis or 0) else 1 for i in range(cotangent.ndim)])

    @property
    def is_over(self) -> bool:
        """Whether the first pass is done, and what arrives now is compared."""
        return self._compared is not None

    def end(self) -> None:
        """The first pass is done."""
        self._compared = 0

    def refuse_missing(self) -> None:
        """Raise unless all that came in the first pass came again."""
        if self._compared != len(self._rehearsed):
            raise TapeRefusal("the model's backward takes another way when it is gone again")

    def take(self, squares: Tensor, parameters: tuple[str, ...]) -> None:
        """The squared norms of one contribution, [n].

        Raises:
            TapeRefusal: they are not what the first pass announced.
        """
        if self._compared is None:
            self._rehearsed.append(squares.double().cpu())
            return
        second = squares.double().cpu()
        first = self._rehearsed[self._compared] if self._compared < len(self._rehearsed) else None
        self._compared += 1
        expected = second * self.factors.square()
        known = torch.isfinite(second)
        same = first is not None and torch.allclose(first[known], expected[known], rtol=TOLERANCE, atol=UNDERFLOW)
        if not same:
            raise TapeRefusal(
                f"what was recorded for {', '.join(parameters)} does not belong to one example each: the model moves "
                "rows from example to example, or lets examples meet, in a way that depends on the data"
            )
