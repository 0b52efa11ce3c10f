"""torch's recurrent layers: each weight receives a sum of outer products over positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpdl.per_sample.tape.batch_axis import BatchAxis
from dpdl.per_sample.tape.contribution import Contribution, Materialized
from dpdl.per_sample.tape.recurrent import Kind, OnProducts, run_recurrent
from dpdl.per_sample.tape.refusal import TapeRefusal
from dpdl.per_sample.tape.rules.products import Arrangement, OuterProducts, SharedGram
from dpdl.per_sample.tape.rules.rule import Rule, RuleCall

__all__ = ["RULES", "packed_layers"]


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
        return call.front(tensor, products_axis).flatten(1, 2)  # [n, t, .]

    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    states = tuple(call.constant(state) for state in states)
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
        on_products=_receiver(call, flat_weights, rows),
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
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if int(batch_sizes[0]) != call.examples or any(call.source(t) is not None for t in (data, *states)):
        raise TapeRefusal(f"a packing of {int(batch_sizes[0])} sequences of {call.examples} examples is not understood")
    places = None if order is None else torch.argsort(order)

    def rows(tensor: Tensor) -> Tensor:
        wide = call.widened(tensor).transpose(0, 1)  # [place, t, .]
        return wide if places is None else wide[places]

    kind = _KINDS[call.function]
    return run_recurrent(
        kind,
        data,
        states if kind == "lstm" else states[0],
        [call.constant(weight) for weight in flat_weights],
        has_biases=has_biases,
        num_layers=num_layers,
        dropout=dropout,
        training=train,
        bidirectional=bidirectional,
        batch_first=False,
        batch_sizes=batch_sizes,
        anchor=call.anchor,
        on_products=_receiver(call, flat_weights, rows),
    )


def _receiver(call: RuleCall, flat_weights: Sequence[Tensor], rows: Callable[[Tensor], Tensor]) -> OnProducts:
    """What hands the layers' products on to the weights' sources.

    Args:
        rows: from [t, place, .] to [n, t, .].
    """
    sources = [call.source(weight) for weight in flat_weights]
    call.uses(*sources)
    latest: list[tuple[Tensor, Tensor, SharedGram]] = []  # g as it came, as rows, and what its weights share

    def on_products(position: int, a: Tensor | None, g: Tensor) -> None:
        source = sources[position]
        if source is None:
            return
        if not latest or latest[0][0] is not g:
            latest[:] = [(g, rows(g), SharedGram(2))]
        _, g, shared = latest[0]  # [n, t, o]
        contribution: Contribution
        if a is None:
            contribution = Materialized(g.sum(1))
        else:
            a = rows(a)
            arrangement = Arrangement(shape=(g.shape[2], a.shape[2]), order=(0, 1))
            contribution = OuterProducts(a.unsqueeze(1), g.unsqueeze(1), arrangement, shared=shared)
        call.receive(source, contribution)

    return on_products


_KINDS: dict[Any, Kind] = {
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
}
RULES: dict[Any, Rule] = {function: partial(layers, kind) for function, kind in _KINDS.items()}
