"""Where a model's outputs carry the batch, measured by running it for one example and for two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dpdl.errors import ModelError
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.randomness import isolated_randomness

__all__ = ["OutputLayout"]


@dataclass(frozen=True, kw_only=True)
class OutputLayout:
    """The structure of an output and, for each of its tensors, the axis of the batch.

    Attributes:
        spec: how the output's leaves fit together.
        axes: for each leaf the batch axis; None for a scalar (a loss computed inside the model) and
            for leaves that are not tensors.
    """

    spec: TreeSpec
    axes: tuple[int | None, ...]

    @classmethod
    def measure(cls, call: Callable[[ExampleBatch], Any], batch: ExampleBatch) -> OutputLayout:
        """Run `call` on one row and on two, without a graph, and see which axis grows from 1 to 2.

        Raises:
            ModelError: an output tensor has no axis that follows the batch, or more than one.
        """
        one = batch.rows(slice(0, 1)) if batch.size else batch.zero_rows(1)
        two = one.with_row_leaves(tuple(torch.cat([r, r]) for r in one.row_leaves), size=2)
        with torch.enable_grad(), isolated_randomness(batch.device):  # the model may differentiate inside
            leaves_one, spec = tree_flatten(call(one.copy()))
            leaves_two, spec_two = tree_flatten(call(two.copy()))
        if spec != spec_two:
            raise ModelError(
                "The model's output has another structure for two examples than for one, so it cannot be "
                "split into one output an example. Return tensors with the batch on one axis."
            )
        if not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves_one):
            kinds = sorted({type(leaf).__name__ for leaf in leaves_one})
            raise ModelError(
                f"The model's output has no floating-point tensor that could be found (it holds {kinds}). Return "
                "tensors, in tuples, lists, dicts or dataclasses that torch's pytree knows."
            )
        axes = tuple(_batch_axis(i, a, b) for i, (a, b) in enumerate(zip(leaves_one, leaves_two, strict=True)))
        return cls(spec=spec, axes=axes)

    def leaves(self, output: Any) -> list[Any]:
        """The output's leaves; its structure must be the measured one."""
        leaves, spec = tree_flatten(output)
        if spec != self.spec:
            raise ModelError(f"The model's output changed its structure from {self.spec} to {spec} between calls.")
        return leaves

    def assemble(self, leaves: list[Any]) -> Any:
        """The output that these leaves belong to."""
        return tree_unflatten(leaves, self.spec)


def _batch_axis(position: int, one: Any, two: Any) -> int | None:
    if not isinstance(one, Tensor) or (one.ndim == 0 and two.ndim == 0):
        return None
    grows = [a for a in range(one.ndim) if (one.shape[a], two.shape[a]) == (1, 2)] if one.ndim == two.ndim else []
    if len(grows) != 1:
        raise ModelError(
            f"Output tensor {position} of the model has shape {tuple(one.shape)} for one example and "
            f"{tuple(two.shape)} for two: no single axis follows the batch. Return tensors with one batch "
            "axis, or a scalar loss; keep squeeze() and reductions over examples out of the model."
        )
    return grows[0]
