"""Attention with a learned bias on its scores (relative positions): one copy of the bias for each example.

Its gradient is that of the scores, which has an example's own entries: nothing is summed that would have to be taken
apart again.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dpdl.per_sample.tape.batch_axis import BatchAxis
from dpdl.per_sample.tape.rules.rule import Rule, RuleCall

__all__ = ["RULES"]


def scaled_dot_product_attention(
    call: RuleCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """F.scaled_dot_product_attention of data, with a bias that parameters alone have made."""
    source, axis = call.source(attn_mask), call.axis(query)
    if source is None or axis is None or axis.position != 0 or attn_mask is None or attn_mask.ndim > query.ndim:
        return NotImplemented
    if any(call.source(data) is not None for data in (query, key, value)):
        return NotImplemented
    if attn_mask.ndim == query.ndim and attn_mask.shape[0] != 1:
        return NotImplemented  # it reaches along the axis of the examples
    bias = _for_each_row(call.copy(source), axis, rows=query.shape[0], ndim=query.ndim)
    return F.scaled_dot_product_attention(
        query, key, value, bias, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _for_each_row(copies: Tensor, axis: BatchAxis, *, rows: int, ndim: int) -> Tensor:
    """Copies [n, ...] as [n * k, ...] with `ndim` axes, each example's repeated for its rows."""
    examples, shape = copies.shape[0], copies.shape[1:]
    shape = shape[1:] if len(shape) == ndim else shape  # a first axis of size 1 was the examples'
    own = copies.reshape(examples, 1, *[1] * (ndim - 1 - len(shape)), *shape)
    repeated = own.expand(-1, rows // examples, *own.shape[2:])
    return axis.from_front(repeated)


RULES: dict[Any, Rule] = {F.scaled_dot_product_attention: scaled_dot_product_attention}
