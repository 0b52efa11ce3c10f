"""torch's fused recurrent layers, with the weights as constants that report their per-sample gradients.

`run_recurrent` takes what torch.nn.LSTM, GRU and RNN hand to `torch._VF`, and returns what that returns. When the
backward pass comes by, it says of each weight what its gradient is made of. No weight gradient is formed.

    >>> import torch
    >>> layer, x, gradients = torch.nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3), {}
    >>> weights = [weight.detach() for weight in layer._flat_weights]
    >>> def keep(products):  # per-sample gradients, for the sake of an example
    ...     for position, a in products.operands:
    ...         gradients[position] = torch.einsum("tbo,tbi->boi", products.g, a)
    ...     for position in products.biases:
    ...         gradients[position] = products.g.sum(0)
    >>> zeros = torch.zeros(1, 2, 4)
    >>> output, h, c = run_recurrent("lstm", x, (zeros, zeros), weights, has_biases=True, num_layers=1, dropout=0.0,
    ...     training=True, bidirectional=False, batch_first=True, on_products=keep)
    >>> output.sum().backward()
    >>> [tuple(gradients[position].shape) for position in range(4)]
    [(2, 16, 3), (2, 16, 4), (2, 16), (2, 16)]

Two ways to the gates of an LSTM, which its backward pass needs, were measured (benchmarks/recurrent_rules.py; 64
inputs, 128 units, 64 positions, 64 sequences, one thread of an EPYC with AVX-512): a loop of our own over the
positions, 17 ms; and torch's fused forward pass with the gates computed again from its outputs, for all positions
at once, 28 ms. The second repeats the dearest part of the forward pass, its matrix products, to save only small
operations, and wins only where there is next to nothing to compute. So the loops it is; forward and backward they
take 1.03 of torch's fused LSTM with its weight gradients, 0.67 of its GRU and of its RNN.

Axes: t position, b sequence, i input, o output of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dpdl.errors import ParameterError
from dpdl.per_sample.tape.recurrent_autocast import output_dtype
from dpdl.per_sample.tape.recurrent_cells import GRUCell, SimpleCell
from dpdl.per_sample.tape.recurrent_layer import Cell, Layer
from dpdl.per_sample.tape.recurrent_lstm import LSTMCell
from dpdl.per_sample.tape.recurrent_steps import Steps
from dpdl.per_sample.tape.recurrent_weights import OnProducts, Weights

__all__ = ["Kind", "run_recurrent"]

# Rows on which the CPU does what does not depend on the recursion before going on, so that they are still in the
# core's cache when the loop comes to them. The LSTM below, forward and backward: 31.2 ms with 256 or 512 rows, 33.5
# with 64 and 33.7 with all 4096 at once (one thread of an EPYC with 1 MiB of second-level cache a core).
ROWS_OF_A_BLOCK = 256

Kind = Literal["lstm", "gru", "rnn_tanh", "rnn_relu"]
CELLS: dict[Kind, Cell] = {
    "lstm": LSTMCell(),
    "gru": GRUCell(),
    "rnn_tanh": SimpleCell(activation="tanh"),
    "rnn_relu": SimpleCell(activation="relu"),
}


def run_recurrent(
    kind: Kind,
    inputs: Tensor,
    hx: Tensor | Sequence[Tensor],
    flat_weights: Sequence[Tensor],
    *,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None = None,
    on_products: OnProducts,
    anchor: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """What torch.lstm, torch.gru, torch.rnn_tanh or torch.rnn_relu gives, and its weights' per-sample gradients.

    Gradients flow to `inputs` and `hx` through autograd. The flat weights are constants. During the backward pass
    `on_products` is called once for each gradient that weights have in common, as soon as their layer is done: once
    for an LSTM's or RNN's matrices and biases, twice for a GRU's, whose candidate sets the two sides apart, and once
    for a projection. A weight that is not reported has gradient zero.

    Args:
        kind: which of torch's functions is meant.
        inputs: [t, b, i], or [b, t, i] if `batch_first`, or [rows, i] with `batch_sizes`.
        hx: first states, [layers * directions, b, features]; two of them for an LSTM.
        flat_weights: in torch's order.
        has_biases: whether each matrix but the projection has a bias.
        num_layers: layers, each on the outputs of the one before.
        dropout: rate of the dropout between layers, drawn from torch's default generator if `training`.
        training: whether to drop.
        bidirectional: whether each layer has a second direction, from the last position to the first.
        batch_first: the order of the axes of `inputs` and of the outputs.
        batch_sizes: of a packed sequence: how many sequences, sorted by falling length, are alive at each position.
        on_products: takes what weights receive. For packed sequences this is padded with zeros beyond each
            sequence's length, with b in the packed order.
        anchor: any tensor that requires grad; it makes autograd come by even if nothing else of the call requires
            grad. None: a new one.

    Returns:
        (outputs, last h), or (outputs, last h, last c) for an LSTM, in torch's shapes.

    Guarantee:
        What is computed for a sequence, forward, backward and in its products, depends on that sequence alone,
        not finite numbers in others included.

    Raises:
        ParameterError: the shapes or the number of weights do not fit together.
    """
    first = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    directions = 2 if bidirectional else 1
    groups = list(_grouped(kind, flat_weights, has_biases, num_layers * directions))
    packed = batch_sizes is not None
    values = inputs.transpose(0, 1) if batch_first and not packed else inputs
    sizes = _sizes(values, batch_sizes)
    _check_states(kind, first, len(groups), sizes[0])

    dtype = output_dtype(kind, inputs, flat_weights[0])
    per_block = max(1, ROWS_OF_A_BLOCK // max(1, sizes[0])) if inputs.device.type == "cpu" else len(sizes)
    anchor = torch.zeros((), device=inputs.device, requires_grad=True) if anchor is None else anchor
    last: list[tuple[Tensor, ...]] = []
    with torch.autocast(inputs.device.type, enabled=False):
        values = values.to(flat_weights[0].dtype)
        states = list(zip(*(state.to(values.dtype).unbind(0) for state in first), strict=True))
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                steps = Steps(sizes=sizes, reverse=direction == 1, packed=packed, per_block=per_block)
                output, *after = Layer.apply(
                    CELLS[kind], groups[index], steps, on_products, anchor, values, *states[index]
                )
                outputs.append(output)
                last.append(tuple(after))
            values = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if training and dropout > 0 and layer < num_layers - 1:
                values = F.dropout(values, dropout)
        if kind == "gru" and directions == 1:
            values = values.clone()  # may be changed in place, as torch's may; an LSTM's and RNN's may not there either
        if batch_first and not packed:
            values = values.transpose(0, 1)
        return values.to(dtype), *(torch.stack(parts).to(dtype) for parts in zip(*last, strict=True))


def _grouped(kind: Kind, flat_weights: Sequence[Tensor], has_biases: bool, count: int) -> Iterator[Weights]:
    """The flat weights by layer and direction."""
    each, rest = divmod(len(flat_weights), count)
    plain = 4 if has_biases else 2
    if rest or each - plain not in ((0, 1) if kind == "lstm" else (0,)):
        raise ParameterError(
            f"flat_weights must hold {plain} tensors for each of {count} layers and directions "
            f"(an LSTM with a projection {plain + 1}), got {len(flat_weights)} in all. "
            "Pass them as torch.nn.LSTM, GRU or RNN hands them to torch."
        )
    for position in range(0, len(flat_weights), each):
        group = flat_weights[position : position + each]
        yield Weights(
            input=group[0],
            hidden=group[1],
            input_bias=group[2] if has_biases else None,
            hidden_bias=group[3] if has_biases else None,
            projection=group[plain] if each > plain else None,
            position=position,
        )


def _sizes(values: Tensor, batch_sizes: Tensor | None) -> tuple[int, ...]:
    """Number of sequences alive at each position."""
    if batch_sizes is not None:
        sizes = tuple(batch_sizes.tolist())
    elif values.dim() == 3:
        sizes = (values.shape[1],) * values.shape[0]
    else:
        raise ParameterError(f"inputs must have 3 axes, or 2 with batch_sizes, got shape {tuple(values.shape)}.")
    if not sizes:
        raise ParameterError("a recurrent layer needs at least one position, got none. Drop empty sequences.")
    return sizes


def _check_states(kind: Kind, states: tuple[Tensor, ...], count: int, batch: int) -> None:
    wanted = 2 if kind == "lstm" else 1
    if len(states) != wanted or any(state.dim() != 3 or state.shape[:2] != (count, batch) for state in states):
        raise ParameterError(
            f"hx must be {wanted} tensor(s) of shape [{count}, {batch}, features], "
            f"got {[tuple(state.shape) for state in states]}."
        )
