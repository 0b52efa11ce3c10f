"""torch's recurrent layers: each weight receives a sum of outer products over positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpdl.per_sample.tape.batch_axis import BatchAxis
from dpdl.per_sample.tape.contribution import Contribution, Materialized
from dpdl.per_sample.tape.recurrent import Kind, run_recurrent
from dpdl.per_sample.tape.refusal import TapeRefusal
from dpdl.per_sample.tape.rules.products import Arrangement, OuterProducts, SharedGram
from dpdl.per_sample.tape.rules.rule import Rule, RuleCall

__all__ = ["RULES"]


def layers(
    kind: Kind,
    call: RuleCall,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    flat_weights: Sequence[Tensor],
    has_biases: Any,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: Any = None,
) -> Any:
    """torch.lstm, gru, rnn_tanh and rnn_relu on padded sequences."""
    if not isinstance(has_biases, bool):
        raise TapeRefusal("packed sequences are run one example at a time")
    axis = call.axis(input)
    if axis is None or call.source(input) is not None or axis.position != (0 if batch_first else 1):
        return NotImplemented
    products_axis = BatchAxis(position=1, order=axis.order)
    sources = [call.source(weight) for weight in flat_weights]
    latest: list[tuple[Tensor, Tensor, SharedGram]] = []  # g as it came, as rows, and what its weights share

    def on_products(position: int, a: Tensor | None, g: Tensor) -> None:
        source = sources[position]
        if source is None:
            return
        if not latest or latest[0][0] is not g:
            latest[:] = [(g, call.front(g, products_axis).flatten(1, 2), SharedGram(2))]
        _, g, shared = latest[0]  # [n, t, o]
        contribution: Contribution
        if a is None:
            contribution = Materialized(g.sum(1))
        else:
            a = call.front(a, products_axis).flatten(1, 2)
            order = Arrangement(shape=(g.shape[2], a.shape[2]), order=(0, 1))
            contribution = OuterProducts(a.unsqueeze(1), g.unsqueeze(1), order, shared=shared)
        call.receive(source, contribution)

    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    states = tuple(call.constant(state) for state in states)
    call.uses(*sources)
    return run_recurrent(
        kind,
        input,
        states if kind == "lstm" else states[0],
        [call.constant(weight) for weight in flat_weights],
        has_biases=has_biases,
        num_layers=num_layers,
        dropout=dropout,
        training=train,
        bidirectional=bidirectional,
        batch_first=batch_first,
        anchor=call.anchor,
        on_products=on_products,
    )


RULES: dict[Any, Rule] = {
    torch.lstm: partial(layers, "lstm"),
    torch.gru: partial(layers, "gru"),
    torch.rnn_tanh: partial(layers, "rnn_tanh"),
    torch.rnn_relu: partial(layers, "rnn_relu"),
}
