"""Recurrent layers with constant weights, against plain autograd on one sequence at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpdl.errors import ParameterError
from dpdl.per_sample.tape.recurrent import run_recurrent
from tests.per_sample.tape.recurrent_cases import KINDS, Case, Data, Intercept, cases, check, close, run, states_of


@settings(max_examples=40, deadline=None)
@given(cases())
def test_everything_against_one_sequence_at_a_time(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_loss_on_one_of_the_outputs(kind: str, used: tuple[bool, bool, bool], packed: bool) -> None:
    if used[2] and kind != "lstm":
        pytest.skip("only an LSTM has a c")
    check(
        Case(kind=kind, layers=2, bidirectional=True, lengths=(2, 5, 3) if packed else (4, 4), packed=packed, used=used)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_one_block(kind: str) -> None:
    lengths = tuple(1 + number % 9 for number in range(90))
    check(Case(kind=kind, bidirectional=True, lengths=lengths, packed=True), every=22)
    check(Case(kind=kind, bidirectional=True, lengths=(7,) * 90), every=44)


@pytest.mark.parametrize("kind", KINDS)
def test_input_without_a_batch_axis(kind: str) -> None:
    module = Case(kind=kind).module()
    inputs = torch.randn(6, 3, dtype=torch.float64)
    mode = Intercept()
    expected = module(inputs)[0]
    gradients = torch.autograd.grad(expected.sum(), module._flat_weights)
    with mode:
        actual = module(inputs)[0]
        actual.sum().backward()
    close(actual, expected)
    for position, gradient in enumerate(gradients):
        close(mode.gradient(position, 0, gradient), gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_forward_equals_torch(kind: str) -> None:
    module = Case(kind=kind, layers=2, bidirectional=True).module().float()
    inputs = torch.randn(50, 4, 3)
    with torch.no_grad():
        expected = module(inputs)[0]
        with Intercept():
            actual = module(inputs)[0]
    close(actual, expected, 1e-6)


def lstm_error(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """Largest error of an LSTM's outputs, and their largest value, with weights made smaller or larger."""
    module, inputs = Case(kind="lstm").module(), torch.randn(40, 4, 3).to(dtype).double()
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_((scale * weight).to(dtype).double())
        expected = module(inputs)[0]
        with Intercept():
            actual = module.to(dtype)(inputs.to(dtype))[0]
    return float((actual.double() - expected).abs().max()), float(expected.abs().max())


@pytest.mark.parametrize("scale", [3.0, 1.0, 0.1, 0.01])
def test_float32_keeps_the_digits_of_small_values(scale: float) -> None:
    error, largest = lstm_error(scale, torch.float32)
    assert error < 8 * torch.finfo(torch.float32).eps * largest


def test_bfloat16_keeps_the_digits_of_small_values() -> None:
    error, largest = lstm_error(0.02, torch.bfloat16)
    assert error < 0.05 * largest


@pytest.mark.parametrize("size", [1e5, torch.inf])
def test_gates_of_an_lstm_saturate(size: float) -> None:
    module = Case(kind="lstm", lengths=(2,)).module().float()
    inputs = torch.full((2, 1, 3), size)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(weight.abs() + 0.01)
        with Intercept():
            outputs = module(inputs)[0]
    torch.testing.assert_close(outputs[0], torch.full((1, 5), 1.0).tanh())
    torch.testing.assert_close(outputs[1], torch.full((1, 5), 2.0).tanh())


@pytest.mark.parametrize("kind", KINDS)
def test_float32_products(kind: str) -> None:
    module, mode, inputs = Case(kind=kind, layers=2).module(), Intercept(), torch.randn(30, 1, 3)
    expected = torch.autograd.grad(module(inputs.double())[0].sum(), module._flat_weights)
    with mode:
        module.float()(inputs)[0].sum().backward()
    for position, gradient in enumerate(expected):
        actual = mode.gradient(position, 0, gradient).double()
        assert float((actual - gradient).norm() / gradient.norm()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_stays_in_its_sequence(kind: str) -> None:
    case = Case(kind=kind, layers=2, bidirectional=True, lengths=(4, 3, 2), packed=True)
    module, data = case.module(), Data.of(case)
    clean, dirty = Intercept(), Intercept()
    with clean:
        expected = run(case, module, data)
    data.inputs[1, 0, 0] = torch.nan
    data.d_outputs[1] = torch.inf
    with dirty:
        actual = run(case, module, data)
    others = [0, 2]
    assert not actual[0][1].isfinite().all()
    assert torch.equal(actual[0][others], expected[0][others])
    assert torch.equal(actual[3][0][others], expected[3][0][others])
    for position in range(len(module._flat_weights)):
        like = module._flat_weights[position]
        for sequence in others:
            assert torch.equal(dirty.gradient(position, sequence, like), clean.gradient(position, sequence, like))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_without_gradient_are_enough(kind: str) -> None:
    module, mode = Case(kind=kind).module(), Intercept()
    with mode:
        module(torch.randn(4, 3, 3, dtype=torch.float64))[0].sum().backward()
    assert sorted(mode.products) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_share_a_gradient_are_reported_together(kind: str) -> None:
    mode = Intercept()
    with mode:
        Case(kind=kind).module()(torch.randn(4, 3, 3, dtype=torch.float64))[0].sum().backward()
    assert mode.reported == ([(0, 2), (1, 3)] if kind == "gru" else [(0, 1, 2, 3)])


def test_a_projection_is_reported_by_itself() -> None:
    for biases, expected in ((True, [(0, 1, 2, 3), (4,)]), (False, [(0, 1), (2,)])):
        mode = Intercept()
        with mode:
            module = Case(kind="lstm", projection=2, biases=biases).module()
            module(torch.randn(4, 3, 3, dtype=torch.float64))[0].sum().backward()
        assert mode.reported == expected


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_saved_while_checkpointed(kind: str) -> None:
    case = Case(kind=kind, layers=2)
    module, data = case.module(), Data.of(case)
    plain, recomputed = Intercept(), Intercept()
    inputs = data.inputs.requires_grad_()
    with plain:
        module(inputs)[0].sum().backward()
    (expected,), inputs.grad = [inputs.grad], None

    def forward(value: Tensor) -> Tensor:
        with recomputed:
            output: Tensor = module(value)[0]
            return output

    checkpoint(forward, inputs, use_reentrant=False).sum().backward()
    assert recomputed.calls == 2
    assert torch.equal(inputs.grad, expected)
    for position, (_, g) in plain.products.items():
        assert torch.equal(recomputed.products[position][1], g)


def test_second_backward_pass_gives_the_same_products() -> None:
    for kind in KINDS:
        module, first, second = Case(kind=kind).module(), Intercept(), Intercept()
        with first:
            total = module(torch.randn(4, 3, 3, dtype=torch.float64))[0].sum()
            total.backward(retain_graph=True)
        second.products, first.products = first.products, {}
        total.backward()
        for position, (_, g) in second.products.items():
            assert torch.equal(first.products[position][1], g)


def test_a_state_changed_in_place_before_backward_is_refused() -> None:
    with Intercept():
        outputs, (h, _) = Case(kind="lstm").module()(torch.randn(4, 3, 3, dtype=torch.float64))
    h.mul_(2)  # a copy: nobody minds
    outputs.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified inplace"):
        outputs.sum().backward()


def test_outputs_of_a_gru_may_be_changed_in_place() -> None:
    module, inputs, mode = Case(kind="gru").module(), torch.randn(4, 1, 3, dtype=torch.float64), Intercept()
    gradients = torch.autograd.grad(module(inputs)[0].square().sum(), module._flat_weights)
    with mode:
        outputs, _ = module(inputs)
    outputs.square_().sum().backward()
    for position, gradient in enumerate(gradients):
        close(mode.gradient(position, 0, gradient), gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers(kind: str) -> None:
    module = Case(kind=kind, layers=3).module()
    module.dropout = 0.25
    inputs = torch.randn(15, 50, 3, dtype=torch.float64)
    kept, dropping = Intercept(), Intercept()
    module.eval()
    with kept:
        module(inputs)[0].sum().backward()
    module.train()
    with dropping:
        module(inputs)[0].sum().backward()
    assert torch.equal(kept.products[0][0], dropping.products[0][0])  # none before the first layer
    before, after = kept.products[4][0], dropping.products[4][0]
    alive = after != 0
    torch.testing.assert_close(after[alive], before[alive] / 0.75)
    # 3,750 draws (relu's own zeros left out): five standard deviations.
    share = float(alive[before != 0].double().mean())
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / int((before != 0).sum())) ** 0.5
    second = dropping.products[8][0] != 0
    assert 0.65 < float(second[kept.products[8][0] != 0].double().mean()) < 0.85 or kind == "rnn_relu"


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_the_dtypes_of_torch(kind: str) -> None:
    module = Case(kind=kind, layers=2).module().float()
    inputs = torch.randn(6, 4, 3)
    mode = Intercept()
    with torch.autocast("cpu", torch.bfloat16):
        expected, last = module(inputs)
        with mode:
            actual, ours = module(inputs)
        actual.float().sum().backward()
    assert actual.dtype == expected.dtype
    assert [each.dtype for each in states_of(ours)] == [each.dtype for each in states_of(last)]
    close(actual.float(), expected.float(), 0.02)
    assert {g.dtype for _, g in mode.products.values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind: str) -> None:
    module, mode = Case(kind=kind, bidirectional=True).module(), Intercept()
    with mode:
        outputs, _ = module(torch.zeros(4, 0, 3, dtype=torch.float64, requires_grad=True))
        outputs.sum().backward()
    assert outputs.shape == (4, 0, 10)
    assert mode.products[0][1].shape[:2] == (4, 0)


def test_what_does_not_fit_is_refused() -> None:
    weights = [torch.zeros(20, 3), torch.zeros(20, 5)]
    options: dict[str, Any] = {
        "has_biases": False,
        "num_layers": 1,
        "dropout": 0.0,
        "training": True,
        "bidirectional": False,
        "batch_first": False,
        "on_products": lambda *products: None,
    }
    states = (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5))
    with pytest.raises(ParameterError, match="flat_weights must hold 2"):
        run_recurrent("lstm", torch.zeros(4, 2, 3), states, weights * 2, **options)
    with pytest.raises(ParameterError, match="hx must be 2"):
        run_recurrent("lstm", torch.zeros(4, 3, 3), states, weights, **options)
    with pytest.raises(ParameterError, match="3 axes"):
        run_recurrent("lstm", torch.zeros(4, 3), states, weights, **options)
    with pytest.raises(ParameterError, match="at least one position"):
        run_recurrent("lstm", torch.zeros(0, 2, 3), states, weights, **options)
