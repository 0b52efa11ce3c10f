"""Recurrent layers that report per-sample gradients, over torch's fused layers: time, interleaved, median.

    python -m benchmarks.recurrent_rules                                                # prints a table
    python -m benchmarks.recurrent_rules --output benchmarks/results/recurrent_rules.json

"Plain" is torch's layer with its weight gradients, ours the forward and backward pass of
`dpdl.per_sample.tape.recurrent` up to the products from which norms and clipped sums are made. The inputs need a
gradient in both. The last table is about how ours should come by the gates of an LSTM, which its backward pass
needs: from a loop of its own, or from the outputs of torch's fused forward pass, for all positions at once.
Times are process CPU time with one thread; figures to compare are the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.environment import environment
from dpdl.per_sample.tape.recurrent import Kind, run_recurrent

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer and a batch for it."""

    positions: int
    batch: int
    inputs: int
    hidden: int


SHAPES = (
    Shape(positions=64, batch=64, inputs=64, hidden=128),  # the LSTM classifier of the engines' benchmark
    Shape(positions=128, batch=16, inputs=256, hidden=256),
    Shape(positions=32, batch=256, inputs=32, hidden=64),
    Shape(positions=20, batch=8, inputs=16, hidden=32),
)
LAYERS: dict[Kind, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}


def steps(kind: Kind, shape: Shape) -> dict[str, Step]:
    """Forward and backward passes, plain and ours."""
    torch.manual_seed(0)
    layer = LAYERS[kind](shape.inputs, shape.hidden, batch_first=True)
    weights = [weight.detach() for weight in layer._flat_weights]
    inputs = torch.randn(shape.batch, shape.positions, shape.inputs, requires_grad=True)
    zeros = torch.zeros(1, shape.batch, shape.hidden)
    d_outputs = torch.randn(shape.batch, shape.positions, shape.hidden)

    def ours() -> Tensor:
        return run_recurrent(
            kind,
            inputs,
            (zeros, zeros) if kind == "lstm" else zeros,
            weights,
            has_biases=True,
            num_layers=1,
            dropout=0.0,
            training=True,
            bidirectional=False,
            batch_first=True,
            on_products=lambda products: None,
        )[0]

    return {
        "plain forward": lambda: layer(inputs),
        "ours forward": ours,
        "plain": lambda: layer(inputs)[0].backward(d_outputs),
        "ours": lambda: ours().backward(d_outputs),
    }


def gates_again(shape: Shape) -> Step:
    """torch's fused forward pass, then the gates of all positions from its outputs, and c by its recursion."""
    torch.manual_seed(0)
    layer = nn.LSTM(shape.inputs, shape.hidden)
    w_input, w_hidden, b_input, b_hidden = (weight.detach() for weight in layer._flat_weights)
    inputs = torch.randn(shape.positions, shape.batch, shape.inputs)
    rows, hidden = shape.positions * shape.batch, shape.hidden

    @torch.no_grad()
    def step() -> Tensor:
        outputs, _ = layer(inputs)
        gates = torch.addmm(b_input + b_hidden, inputs.view(rows, -1), w_input.t())
        gates[shape.batch :].addmm_(outputs.view(rows, hidden)[: -shape.batch], w_hidden.t())
        gates[:, : 2 * hidden].sigmoid_()
        gates[:, 2 * hidden : 3 * hidden].tanh_()
        gates[:, 3 * hidden :].sigmoid_()
        c = torch.zeros(rows + shape.batch, hidden)
        states = c.split(shape.batch)
        by_gate = (part.split(shape.batch) for part in gates.split(hidden, 1)[:3])
        for i, f, g, before, after in zip(*by_gate, states[:-1], states[1:], strict=True):
            torch.mul(f, before, out=after).addcmul_(i, g)
        return c.tanh()

    return step


def interleaved(functions: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, measured in turns; two rounds first that do not count."""
    milliseconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 2):
        for name, function in functions.items():
            began = time.process_time()
            function()
            if number >= 2:
                milliseconds[name].append(1e3 * (time.process_time() - began))
    return {name: statistics.median(times) for name, times in milliseconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default 15)")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)

    console = Console()
    table = Table("layer", "T, B, in, hidden", "plain ms", "ours ms", "ours / plain", title="forward and backward")
    rows, ways = [], []
    for kind in LAYERS:
        for shape in SHAPES:
            medians = interleaved(steps(kind, shape), options.rounds)
            ratio = medians["ours"] / medians["plain"]
            rows.append({"layer": kind, **asdict(shape), "milliseconds": medians, "ratio": ratio})
            size = f"{shape.positions}, {shape.batch}, {shape.inputs}, {shape.hidden}"
            table.add_row(kind, size, f"{medians['plain']:.2f}", f"{medians['ours']:.2f}", f"{ratio:.2f}")
    console.print(table)

    table = Table("T, B, in, hidden", "own loop ms", "fused, gates again ms", title="gates of an LSTM")
    for shape in SHAPES:
        functions = {"own loop": steps("lstm", shape)["ours forward"], "fused, gates again": gates_again(shape)}
        medians = interleaved(functions, options.rounds)
        ways.append({**asdict(shape), "milliseconds": medians})
        size = f"{shape.positions}, {shape.batch}, {shape.inputs}, {shape.hidden}"
        table.add_row(size, *(f"{each:.2f}" for each in medians.values()))
    console.print(table)

    if options.output is not None:
        record = {"environment": environment(), "rounds": options.rounds, "layers": rows, "lstm_gates": ways}
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
