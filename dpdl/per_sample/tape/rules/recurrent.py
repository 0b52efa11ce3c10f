"""torch's recurrent layers: each weight receives a sum of outer products over positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpdl.per_sample.tape.batch_axis import BatchAxis
from dpdl.per_sample.tape.contribution import Materialized
from dpdl.per_sample.tape.recurrent import Kind, run_recurrent
from dpdl.per_sample.tape.recurrent_weights import OnProducts, Products
from dpdl.per_sample.tape.refusal import TapeRefusal
from dpdl.per_sample.tape.rules.products import Arrangement, OuterProducts, SharedGram, gram_is_cheaper
from dpdl.per_sample.tape.rules.rule import Rule, RuleCall

__all__ = ["RULES", "packed_layers"]

Rows = Callable[[Tensor], Tensor]
"""From [t, place, .] to [n, t, .], in the dtype in which sums are taken."""


def layers(
    kind: Kind,
    call: RuleCall,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    flat_weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """torch.lstm, gru, rnn_tanh and rnn_relu on padded sequences."""
    axis = call.axis(input)
    if axis is None or call.source(input) is not None or axis.position != (0 if batch_first else 1):
        return NotImplemented
    products_axis = BatchAxis(position=1, order=axis.order)

    def rows(tensor: Tensor) -> Tensor:
        return call.front(tensor, products_axis).flatten(1, 2)

    run = _prepared(call, kind, hx, flat_weights, rows)
    return run(
        input,
        has_biases=has_biases,
        num_layers=num_layers,
        dropout=dropout,
        training=train,
        bidirectional=bidirectional,
        batch_first=batch_first,
    )


def packed_layers(
    call: RuleCall,
    order: Tensor | None,
    data: Tensor,
    batch_sizes: Tensor,
    hx: Tensor | Sequence[Tensor],
    flat_weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> Any:
    """The same on packed sequences.

    Args:
        order: which example is at each place of the packing, [n]; None: each at its own.
    """
    data_and_states = (data, hx) if isinstance(hx, Tensor) else (data, *hx)
    if int(batch_sizes[0]) != call.examples or any(call.source(t) is not None for t in data_and_states):
        raise TapeRefusal(f"a packing of {int(batch_sizes[0])} sequences of {call.examples} examples is not understood")
    places = None if order is None else torch.argsort(order)

    def rows(tensor: Tensor) -> Tensor:
        wide = call.widened(tensor).transpose(0, 1)  # [place, t, .]
        return wide if places is None else wide[places]

    run = _prepared(call, _KINDS[call.function], hx, flat_weights, rows)
    return run(
        data,
        has_biases=has_biases,
        num_layers=num_layers,
        dropout=dropout,
        training=train,
        bidirectional=bidirectional,
        batch_first=False,
        batch_sizes=batch_sizes,
    )


def _prepared(
    call: RuleCall, kind: Kind, hx: Tensor | Sequence[Tensor], flat_weights: Sequence[Tensor], rows: Rows
) -> Callable[..., tuple[Tensor, ...]]:
    """`run_recurrent` on constants, with what its weights receive handed on to their sources."""
    states = (hx,) if isinstance(hx, Tensor) else hx
    return partial(
        run_recurrent,
        kind,
        hx=[call.constant(state) for state in states],
        flat_weights=[call.constant(weight) for weight in flat_weights],
        anchor=call.anchor,
        on_products=_receiver(call, flat_weights, rows),
    )


def _receiver(call: RuleCall, flat_weights: Sequence[Tensor], rows: Rows) -> OnProducts:
    sources = [call.source(weight) for weight in flat_weights]
    call.uses(*sources)

    def on_products(products: Products) -> None:
        g = rows(products.g)
        operands = [(source, rows(a)) for position, a in products.operands if (source := sources[position]) is not None]
        n, t, outputs = g.shape
        # The weights have one Gram matrix of g in common, so it pays for all of them or for none.
        as_gram = gram_is_cheaper((n, 1, t, sum(a.shape[2] for _, a in operands), outputs))
        shared = SharedGram(len(operands) if as_gram else 1)
        for source, a in operands:
            arrangement = Arrangement(shape=(outputs, a.shape[2]), order=(0, 1))
            a, g_of_all = a.unsqueeze(1), g.unsqueeze(1)
            call.receive(source, OuterProducts(a, g_of_all, arrangement, keeps_operands=as_gram, shared=shared))
        biases = [source for position in products.biases if (source := sources[position]) is not None]
        if biases:
            of_all = Materialized(g.sum(1))  # with its norms, which are so taken once
            for source in biases:
                call.receive(source, of_all)

    return on_products


_KINDS: dict[Any, Kind] = {
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
}
RULES: dict[Any, Rule] = {function: partial(layers, kind) for function, kind in _KINDS.items()}
