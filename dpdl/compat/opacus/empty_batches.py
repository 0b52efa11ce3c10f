"""A collate function that also takes no examples, shaped as earlier batches were.

The loaders of this facade do not need it: they learn the shape from the dataset (`dpdl.sampling`). It is here for
scripts that build their own loader with it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpdl.compat.opacus.errors import BatchKindError

__all__ = ["CollateFnWithEmpty", "wrap_collate_with_empty"]

_log = logging.getLogger("dpdl.compat.opacus.data_loader")


class CollateFnWithEmpty:
    """Collates as another function does; no examples become tensors of length 0 along the batch.

    Args:
        collator_fn: collates one or more examples; None to hand them on as a list.
        batch_first: whether batches have the examples on the first axis, or on the second.
        rand_on_empty: make a batch of one random example instead. Not for private training: it doubles sensitivity.
        sample_empty_shapes, dtypes: what to make if the very first batch is empty.

    Raises (when called):
        BatchKindError: a batch holds something of which an empty one cannot be made.
    """

    def __init__(
        self,
        collator_fn: Callable[[list[Any]], Any] | None,
        batch_first: bool = True,
        rand_on_empty: bool = False,
        sample_empty_shapes: Sequence[tuple[int, ...]] | None = None,
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> None:
        self.wrapped_collator_fn = collator_fn
        self.batch_first = batch_first
        self.rand_on_empty = rand_on_empty
        self.sample_empty_shapes = sample_empty_shapes
        self.dtypes = dtypes
        self._form: Any = None

    def __call__(self, batch: list[Any]) -> Any:
        """The batch, collated; or an empty one.

        Raises:
            BatchKindError: of what the first batch was, an empty one cannot be made.
        """
        if batch:
            collated = batch if self.wrapped_collator_fn is None else self.wrapped_collator_fn(batch)
            if self._form is None:
                self._form = copy.deepcopy(collated)
            return collated
        if self._form is not None:
            return self._emptied(self._form)
        _log.warning("First batch is empty: its structure is not known yet, a list of empty tensors stands for it.")
        if self.sample_empty_shapes is None or self.dtypes is None:
            return []
        return [
            torch.zeros(shape, dtype=kind) for shape, kind in zip(self.sample_empty_shapes, self.dtypes, strict=True)
        ]

    def _emptied(self, form: Any) -> Any:
        if isinstance(form, Tensor):
            shape = list(form.shape)
            shape[0 if self.batch_first else 1] = 1 if self.rand_on_empty else 0
            if self.rand_on_empty:
                return torch.randint(0, 2, shape, dtype=form.dtype, device=form.device)
            return torch.empty(shape, dtype=form.dtype, device=form.device)
        if isinstance(form, Mapping):
            return {key: self._emptied(value) for key, value in form.items()}
        if isinstance(form, (list, tuple)):
            return type(form)([self._emptied(value) for value in form])
        raise BatchKindError(
            f"Unsupported batch type {type(form).__name__}: an empty batch cannot be made of it. Return tensors in "
            "lists, tuples or dicts from the collate function."
        )


def wrap_collate_with_empty(
    *,
    collate_fn: Callable[[list[Any]], Any] | None,
    batch_first: bool = True,
    rand_on_empty: bool = False,
    sample_empty_shapes: Sequence[tuple[int, ...]] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> CollateFnWithEmpty:
    """`CollateFnWithEmpty` around a collate function.

    Args:
        collate_fn: collates one or more examples; None to hand them on as a list.
        batch_first, rand_on_empty, sample_empty_shapes, dtypes: as in `CollateFnWithEmpty`.
    """
    return CollateFnWithEmpty(collate_fn, batch_first, rand_on_empty, sample_empty_shapes, dtypes)
