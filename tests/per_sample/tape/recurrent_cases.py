"""Cases for the recurrent layers: what is run, and how it is compared with one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

from dpdl.per_sample.tape.recurrent import run_recurrent
from dpdl.per_sample.tape.recurrent_weights import Products

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


class Intercept(TorchFunctionMode):
    """Sends torch's fused recurrent functions to `run_recurrent`, and keeps what it reports."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.products: dict[int, tuple[Tensor | None, Tensor]] = {}
        self.reported: list[tuple[int, ...]] = []  # positions of the weights of each report

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name not in KINDS:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        packed = isinstance(args[3], list | tuple)
        inputs, sizes, (hx, weights, *rest) = args[0], args[1] if packed else None, args[2 if packed else 1 :]
        names = ("has_biases", "num_layers", "dropout", "training", "bidirectional", "batch_first")
        return run_recurrent(
            name,
            inputs,
            hx,
            [weight.detach() for weight in weights],
            batch_sizes=sizes,
            on_products=self.keep,
            **{"batch_first": False, **dict(zip(names, rest, strict=False))},
        )

    def keep(self, products: Products) -> None:
        assert not products.g.requires_grad
        self.reported.append((*(position for position, _ in products.operands), *products.biases))
        for position, a in (*products.operands, *((position, None) for position in products.biases)):
            assert position not in self.products
            assert a is None or a.shape[:2] == products.g.shape[:2]
            assert a is None or not a.requires_grad
            self.products[position] = a, products.g

    def gradient(self, position: int, sequence: int, like: Tensor) -> Tensor:
        if position not in self.products:
            return torch.zeros_like(like)
        a, g = self.products[position]
        return g[:, sequence].sum(0) if a is None else g[:, sequence].T @ a[:, sequence]


@dataclass(frozen=True, kw_only=True)
class Case:
    kind: str
    layers: int = 1
    bidirectional: bool = False
    biases: bool = True
    projection: int = 0
    batch_first: bool = False
    given_states: bool = True
    lengths: tuple[int, ...] = (4, 4, 4)
    packed: bool = False
    used: tuple[bool, bool, bool] = (True, True, True)  # output, last h, last c
    seed: int = 0

    def module(self) -> nn.RNNBase:
        torch.manual_seed(self.seed)
        options: dict[str, Any] = {
            "num_layers": self.layers,
            "bias": self.biases,
            "batch_first": self.batch_first,
            "bidirectional": self.bidirectional,
            "dtype": torch.float64,
        }
        if self.kind == "lstm":
            return nn.LSTM(3, 5, proj_size=self.projection, **options)
        if self.kind == "gru":
            return nn.GRU(3, 5, **options)
        return nn.RNN(3, 5, nonlinearity=self.kind.removeprefix("rnn_"), **options)


def cases() -> st.SearchStrategy[Case]:
    """Every combination of options, over a few lengths."""

    def complete(drawn: tuple[str, int, bool, bool, int, bool, bool, list[int], str, list[bool], int]) -> Case:
        kind, layers, bidirectional, biases, projection, batch_first, given_states, lengths, form, used, seed = drawn
        packed = form != "padded"
        if form == "padded":
            lengths = [lengths[0]] * len(lengths)
        if form == "sorted":
            lengths = sorted(lengths, reverse=True)
        if kind != "lstm":
            projection, used[2] = 0, False
        if not any(used):
            used[0] = True
        return Case(
            kind=kind,
            layers=layers,
            bidirectional=bidirectional,
            biases=biases,
            projection=projection,
            batch_first=batch_first,
            given_states=given_states,
            lengths=tuple(lengths),
            packed=packed,
            used=(used[0], used[1], used[2]),
            seed=seed,
        )

    return st.tuples(
        st.sampled_from(KINDS),
        st.integers(1, 3),
        st.booleans(),
        st.booleans(),
        st.sampled_from([0, 2]),
        st.booleans(),
        st.booleans(),
        st.lists(st.integers(1, 5), min_size=1, max_size=4),
        st.sampled_from(["padded", "sorted", "unsorted"]),
        st.lists(st.booleans(), min_size=3, max_size=3),
        st.integers(0, 999),
    ).map(complete)


@dataclass(frozen=True, kw_only=True)
class Data:
    """One batch, batch axis first everywhere, and the gradients that its outputs receive."""

    inputs: Tensor
    states: list[Tensor]
    d_outputs: Tensor
    d_states: list[Tensor]

    @classmethod
    def of(cls, case: Case) -> Data:
        torch.manual_seed(case.seed + 1)
        count, longest = len(case.lengths), max(case.lengths)
        directions = 2 if case.bidirectional else 1
        width = case.projection or 5
        widths = [width, 5] if case.kind == "lstm" else [width]

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64)

        return cls(
            inputs=draw(count, longest, 3),
            states=[draw(count, case.layers * directions, each) for each in widths],
            d_outputs=draw(count, longest, directions * width),
            d_states=[draw(count, case.layers * directions, each) for each in widths],
        )


def loss_of(case: Case, outputs: Tensor, states: Sequence[Tensor], data: Data, which: slice) -> Tensor:
    """Outputs [b, t, features] and states [layers, b, features], against the drawn gradients of `which`."""
    total = outputs.new_zeros(())
    if case.used[0]:
        total = total + (outputs * data.d_outputs[which, : outputs.shape[1]]).sum()
    for used, state, d_state in zip(case.used[1:], states, data.d_states, strict=False):
        if used:
            total = total + (state.transpose(0, 1) * d_state[which]).sum()
    return total


def states_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def hx_of(case: Case, states: Sequence[Tensor]) -> Any:
    """States with the batch first, as a module takes them."""
    if not case.given_states:
        return None
    turned = [state.transpose(0, 1) for state in states]
    return tuple(turned) if case.kind == "lstm" else turned[0]


def run(case: Case, module: nn.RNNBase, data: Data) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor], list[Tensor]]:
    """Outputs [b, t, features], last states, the leaves, and the leaves' gradients, of the whole batch."""
    inputs = data.inputs.clone().requires_grad_()
    states = [state.clone().requires_grad_() for state in data.states]
    hx = hx_of(case, states)
    fed: Any = inputs if case.batch_first else inputs.transpose(0, 1)
    if case.packed:
        fed = pack_padded_sequence(
            fed,
            torch.tensor(case.lengths),
            case.batch_first,
            enforce_sorted=sorted(case.lengths, reverse=True) == list(case.lengths),
        )
    outputs, last = module(fed, hx)
    if isinstance(outputs, PackedSequence):
        outputs, lengths = pad_packed_sequence(outputs, case.batch_first)
        assert tuple(lengths.tolist()) == case.lengths
    if not case.batch_first:
        outputs = outputs.transpose(0, 1)
    leaves = [inputs, *(states if case.given_states else [])]
    last = states_of(last)
    gradients = torch.autograd.grad(
        loss_of(case, outputs, last, data, slice(None)), leaves, allow_unused=True, materialize_grads=True
    )
    return outputs, last, leaves, list(gradients)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def check(case: Case, every: int = 1) -> None:
    """Everything of the batch, and the products of each `every`-th sequence."""
    module, data = case.module(), Data.of(case)
    expected = run(case, module, data)
    mode = Intercept()
    with mode:
        actual = run(case, module, data)
    assert mode.calls == 1
    close(actual[0], expected[0], 1e-12)
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        close(ours, theirs, 1e-12)
    for ours, theirs in zip(actual[3], expected[3], strict=True):
        close(ours, theirs)
    assert all(weight.grad is None for weight in module.parameters())

    # Stable, as torch sorts: the row in the packed order that holds each sequence.
    order = torch.tensor(case.lengths).sort(descending=True)[1].tolist() if case.packed else range(len(case.lengths))
    for row, sequence in list(enumerate(order))[::every]:
        check_sequence(case, module, data, mode, row, sequence)


def check_sequence(case: Case, module: nn.RNNBase, data: Data, mode: Intercept, row: int, sequence: int) -> None:
    """The weights' gradients of one sequence, run alone through torch's own layer."""
    alone = slice(sequence, sequence + 1)
    inputs = data.inputs[alone, : case.lengths[sequence]]
    outputs, last = module(
        inputs if case.batch_first else inputs.transpose(0, 1), hx_of(case, [state[alone] for state in data.states])
    )
    outputs = outputs if case.batch_first else outputs.transpose(0, 1)
    expected = torch.autograd.grad(
        loss_of(case, outputs, states_of(last), data, alone),
        module._flat_weights,
        allow_unused=True,
        materialize_grads=True,
    )
    for position, gradient in enumerate(expected):
        close(mode.gradient(position, row, gradient), gradient)
