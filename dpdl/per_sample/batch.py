"""The arguments of one forward call, seen as rows: one row an example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dpdl.errors import ModelError

__all__ = ["ExampleBatch"]


@dataclass(frozen=True, kw_only=True)
class ExampleBatch:
    """Positional and keyword arguments whose tensors carry the examples on their first axis.

    Attributes:
        leaves: the arguments, flattened.
        spec: how to put them together again, as (args, kwargs).
        size: N, the number of examples.
    """

    leaves: tuple[Any, ...]
    spec: TreeSpec
    size: int

    @classmethod
    def from_call(cls, args: tuple[Any, ...], kwargs: dict[str, Any], *, size: int | None = None) -> ExampleBatch:
        """Read a call's arguments.

        Tensors with no axis at all, and whatever is not a tensor, are handed to every example alike.

        Args:
            args, kwargs: the arguments of the model's forward.
            size: N, where it is known; otherwise that of the first tensor.

        Raises:
            ModelError: there is no tensor, or one whose first axis is not the batch.
        """
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0]
        if not tensors:
            raise ModelError("The model was called without a tensor that has a batch axis; nothing to train on.")
        size = tensors[0].shape[0] if size is None else size
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] != size:
                raise ModelError(
                    f"Tensor argument {position} of the model has shape {tuple(leaf.shape)}, but a batch of "
                    f"{size} examples is expected on its first axis. Put the batch first (expand a shared "
                    "mask to the batch, or register it as a buffer); batches must come from the private loader."
                )
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                raise ModelError(
                    f"Tensor argument {position} of the model requires a gradient. What was computed before "
                    "the private model would be trained without protection: make it part of the model, or "
                    "detach() it."
                )
        return cls(leaves=tuple(leaves), spec=spec, size=size)

    def is_row_leaf(self, leaf: Any) -> bool:
        """Whether a leaf carries examples (otherwise every example gets all of it)."""
        return isinstance(leaf, Tensor) and leaf.ndim > 0

    @property
    def row_leaves(self) -> tuple[Tensor, ...]:
        """The leaves that carry examples, each [N, ...]."""
        return tuple(leaf for leaf in self.leaves if self.is_row_leaf(leaf))

    def with_row_leaves(self, rows: tuple[Tensor, ...], *, size: int) -> ExampleBatch:
        """The same call with other examples in it."""
        replacement = iter(rows)
        leaves = tuple(next(replacement) if self.is_row_leaf(leaf) else leaf for leaf in self.leaves)
        return ExampleBatch(leaves=leaves, spec=self.spec, size=size)

    def rows(self, index: slice | Tensor) -> ExampleBatch:
        """The examples at `index`."""
        chosen = tuple(leaf[index] for leaf in self.row_leaves)
        return self.with_row_leaves(chosen, size=chosen[0].shape[0])

    def copy(self) -> ExampleBatch:
        """The same examples in tensors of their own, for a model that may write to its input."""
        return self.with_row_leaves(tuple(leaf.clone() for leaf in self.row_leaves), size=self.size)

    def zero_rows(self, size: int) -> ExampleBatch:
        """`size` examples of zeros, shaped as these: something to learn shapes from."""
        zeros = tuple(leaf.new_zeros((size, *leaf.shape[1:])) for leaf in self.row_leaves)
        return self.with_row_leaves(zeros, size=size)

    def call_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs), to call the model with."""
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return args, kwargs

    @property
    def device(self) -> torch.device:
        """Where the examples are."""
        return self.row_leaves[0].device
