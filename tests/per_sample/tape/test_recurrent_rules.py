"""Recurrent layers in the tape: the two forms of their norms, what their weights share, and examples kept apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.tape import TapeEngine
from dpdl.per_sample.tape.rules import products
from tests.per_sample.tape.against_autograd import Numbers, Using, check, cotangents_of, measured

KINDS: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
# Positions, inputs, units. By the cost model the first is contracted by Gram matrices, the second materialised.
# In the third the input weight alone would be materialised: by then the other's Gram matrix of g is there.
FORMS = {"gram": (8, 24, 40), "materialised": (64, 3, 4), "gram for both": (64, 64, 128)}


@pytest.fixture
def grams(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of what Gram matrices are taken of."""
    widths = []
    plain = products.gram_matrices

    def counted(x: Tensor) -> Tensor:
        widths.append(x.shape[2])
        return plain(x)

    monkeypatch.setattr(products, "gram_matrices", counted)
    return widths


def model(kind: str, inputs: int, units: int, **options: Any) -> nn.Module:
    rnn = KINDS[kind](inputs, units, batch_first=True, **options)  # type: ignore[call-arg]
    return Using(lambda m, x: m.rnn(x)[0][:, -1], rnn=rnn)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_of_norms_are_exact(kind: str, form: str, dtype: torch.dtype) -> None:
    positions, inputs, units = FORMS[form]
    check(model(kind, inputs, units), Numbers()(3, positions, inputs), dtype=dtype)


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_a_layer_take_the_gram_matrices_of_their_gradient_once(form: str, grams: list[int]) -> None:
    positions, inputs, units = FORMS[form]
    module, x = model("lstm", inputs, units), Numbers()(1, positions, inputs).float()  # one example: no rehearsal
    measured(module, (x,))
    assert sorted(grams) == ([] if form == "materialised" else [inputs, units, 4 * units])


def test_a_frozen_weight_has_no_part_in_it(grams: list[int]) -> None:
    module, x = model("lstm", 24, 40), Numbers()(1, 8, 24).float()
    for name, p in module.named_parameters():
        p.requires_grad_(name == "rnn.weight_hh_l0")
    measured(module, (x,))
    assert sorted(grams) == [40, 160]
    check(module, Numbers()(3, 8, 24))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_used_twice(kind: str) -> None:
    rnn = KINDS[kind](24, 24, batch_first=True)  # type: ignore[call-arg]
    check(Using(lambda m, x: m.rnn(m.rnn(x)[0])[0], rnn=rnn), Numbers()(3, 6, 24))


@pytest.mark.parametrize("form", ["gram", "materialised"])
@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_in_one_example_reaches_no_other(kind: str, form: str) -> None:
    positions, inputs, units = FORMS[form]
    module, x = model(kind, inputs, units, num_layers=2, bidirectional=True), Numbers()(4, positions, inputs).float()
    engine, trainable = TapeEngine(module), dict(module.named_parameters())
    keep = torch.tensor([1.0, 2.0, 0.0, 3.0])

    def answers(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        forward = engine.forward(ExampleBatch.from_call((rows,), {}), trainable)
        (cotangent,) = cotangents_of([(4, 2 * units)])
        with torch.no_grad():
            (part,) = forward.pull_back({0: cotangent.float()})
            return part.norms(), part.weighted_sum(keep)

    norms, sums = answers(x)
    x[2, 0, 0] = torch.nan
    dirty_norms, dirty_sums = answers(x)
    others = [0, 1, 3]
    assert torch.equal(dirty_norms[others], norms[others])
    assert not dirty_norms[2].isfinite()
    for name, total in sums.items():
        assert torch.equal(dirty_sums[name], total), name


@pytest.mark.parametrize("kind", KINDS)
def test_two_biases_that_are_one_parameter_receive_twice(kind: str) -> None:
    module = model(kind, 3, 4)
    module.rnn.bias_hh_l0 = module.rnn.bias_ih_l0
    check(module, Numbers()(5, 6, 3))
