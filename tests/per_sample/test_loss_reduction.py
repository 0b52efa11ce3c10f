"""How the loss combines examples is declared, and checked: a wrong declaration rescales every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dpdl
from dpdl.errors import LossError, ParameterError
from tests.oracles import one_at_a_time as oracle
from tests.per_sample.case import ENGINES, N, cross_entropy_sum, language_model_mean, language_model_sum, mse_sum
from tests.per_sample.small_models import BY_NAME

pytestmark = pytest.mark.parametrize("engine", ENGINES)

CASE = BY_NAME["mlp_tanh"]
WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5])


def class_weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """Divides by the batch's total weight, so that each example's share depends on the others."""
    return F.cross_entropy(outputs, targets, weight=WEIGHTS.to(outputs.dtype))


def class_weighted_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=WEIGHTS.to(outputs.dtype), reduction="sum")


def mean_by_hand(outputs: Tensor, targets: Tensor) -> Tensor:
    """The divisor is a Python number that no trace of tensor operations sees change with the batch."""
    return F.cross_entropy(outputs, targets, reduction="sum") / max(len(targets), 1)


def mean_by_tensor(outputs: Tensor, targets: Tensor) -> Tensor:
    """The same, with the divisor in a tensor."""
    return F.cross_entropy(outputs, targets, reduction="sum") / torch.ones_like(targets).sum().clamp(min=1)


def pairwise(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compares examples with each other, as contrastive losses do."""
    return F.cross_entropy(outputs @ outputs.t(), torch.arange(len(targets)))


@pytest.mark.parametrize("function", [dpdl.per_sample_gradients, dpdl.per_sample_norms])
def test_mean_and_sum_give_the_same_gradients(engine: str, function: Callable) -> None:  # type: ignore[type-arg]
    mean = function(CASE.module(), F.cross_entropy, *CASE.batch(), engine=engine, loss_reduction="mean")
    total = function(CASE.module(), cross_entropy_sum, *CASE.batch(), engine=engine, loss_reduction="sum")
    if isinstance(mean, Tensor):
        torch.testing.assert_close(mean, total, rtol=1e-12, atol=0.0)
    else:
        assert oracle.worst_error(mean, total)[0] <= 1e-12


@pytest.mark.parametrize(
    ("declared", "loss_fn"),
    [
        ("mean", cross_entropy_sum),
        ("sum", F.cross_entropy),
        ("mean", class_weighted),
        ("sum", class_weighted),
        ("sum", mean_by_hand),
        ("sum", mean_by_tensor),
        ("mean", pairwise),
        ("sum", pairwise),
    ],
)
def test_a_wrong_declaration_is_refused(
    engine: str, declared: str, loss_fn: Callable[[Tensor, Tensor], Tensor]
) -> None:
    for function in (dpdl.per_sample_gradients, dpdl.per_sample_norms):
        with pytest.raises(LossError):
            function(CASE.module(), loss_fn, *CASE.batch(), engine=engine, loss_reduction=declared)
    with pytest.raises(LossError):
        dpdl.clipped_sum(
            CASE.module(), loss_fn, *CASE.batch(), engine=engine, loss_reduction=declared, max_grad_norm=1.0
        )


@pytest.mark.parametrize("declared", ["mean", "sum"])
def test_a_wrong_declaration_is_refused_in_float32(engine: str, declared: str) -> None:
    loss_fn = cross_entropy_sum if declared == "mean" else F.cross_entropy
    with pytest.raises(LossError):
        dpdl.per_sample_gradients(
            CASE.module(torch.float32),
            loss_fn,
            *CASE.batch(torch.float32),
            engine=engine,
            loss_reduction=declared,
        )


def test_the_error_names_the_argument_to_change(engine: str) -> None:
    with pytest.raises(LossError, match="loss_reduction"):
        dpdl.per_sample_gradients(CASE.module(), cross_entropy_sum, *CASE.batch(), engine=engine)


def test_a_weighted_sum_is_a_sum(engine: str) -> None:
    measured = dpdl.per_sample_gradients(
        CASE.module(), class_weighted_sum, *CASE.batch(), engine=engine, loss_reduction="sum"
    )
    true = oracle.per_sample_gradients(CASE.module(), class_weighted_sum, *CASE.batch())
    assert oracle.worst_error(measured, true)[0] <= 1e-9


@pytest.mark.parametrize("loss_fn", [mean_by_hand, mean_by_tensor])
def test_a_mean_divided_by_hand_is_a_mean(engine: str, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    measured = dpdl.per_sample_gradients(CASE.module(), loss_fn, *CASE.batch(), engine=engine)
    true = oracle.per_sample_gradients(CASE.module(), loss_fn, *CASE.batch())
    assert oracle.worst_error(measured, true)[0] <= 1e-9


def test_a_mean_over_unevenly_padded_tokens_is_refused(engine: str) -> None:
    padded = BY_NAME["language_model_padded_sum"]
    with pytest.raises(LossError):
        dpdl.per_sample_gradients(
            padded.module(),
            lambda o, y: F.cross_entropy(o.reshape(-1, o.shape[-1]), y.reshape(-1), ignore_index=-1),
            *padded.batch(),
            engine=engine,
        )


@pytest.mark.parametrize("declared", ["mean", "sum"])
def test_a_sum_over_the_batchs_count_of_real_tokens_is_refused(engine: str, declared: str) -> None:
    """The count is a number that no trace connects to the examples; it ties their shares together."""
    case = BY_NAME["language_model_padded_sum"]
    inputs, targets = case.batch()
    targets[0, 1:3] = 0  # 17 real tokens: no multiple of the 5 examples
    with pytest.raises(LossError):
        dpdl.per_sample_gradients(
            case.module(),
            lambda o, y: language_model_sum(o, y) / (y != -1).sum(),
            inputs,
            targets,
            engine=engine,
            loss_reduction=declared,
        )


def test_a_mean_over_evenly_long_examples_is_a_mean(engine: str) -> None:
    case = BY_NAME["language_model"]
    measured = dpdl.per_sample_gradients(case.module(), language_model_mean, *case.batch(), engine=engine)
    true = oracle.per_sample_gradients(case.module(), language_model_mean, *case.batch())
    assert oracle.worst_error(measured, true)[0] <= 1e-9


def test_a_sum_that_cannot_be_told_from_a_mean_is_accepted_for_one_example(engine: str) -> None:
    one = CASE.batch(rows=slice(0, 1))
    measured = dpdl.per_sample_gradients(CASE.module(), cross_entropy_sum, *one, engine=engine)
    true = oracle.per_sample_gradients(CASE.module(), F.cross_entropy, *one)
    assert oracle.worst_error(measured, true)[0] <= 1e-9


def test_a_loss_that_is_zero_everywhere_is_no_error(engine: str) -> None:
    for declared in ("mean", "sum"):
        gradients = dpdl.per_sample_gradients(
            CASE.module(),
            lambda o, y: 0.0 * F.cross_entropy(o, y),
            *CASE.batch(),
            engine=engine,
            loss_reduction=declared,
        )
        assert all(not g.any() for g in gradients.values())


def test_unreduced_losses_are_refused(engine: str) -> None:
    with pytest.raises(LossError):
        dpdl.per_sample_gradients(
            CASE.module(), lambda o, y: F.cross_entropy(o, y, reduction="none"), *CASE.batch(), engine=engine
        )


def test_identical_examples_do_not_hide_a_wrong_declaration(engine: str) -> None:
    rows = torch.zeros(N, dtype=torch.long)
    for declared, loss_fn in (("mean", cross_entropy_sum), ("sum", F.cross_entropy)):
        with pytest.raises(LossError):
            dpdl.per_sample_gradients(
                CASE.module(), loss_fn, *CASE.batch(rows=rows), engine=engine, loss_reduction=declared
            )


def test_a_large_offset_does_not_hide_a_wrong_declaration(engine: str) -> None:
    case = BY_NAME["linear_mse_sum"]
    x, y = case.batch(torch.float32)
    with pytest.raises(LossError):
        dpdl.per_sample_gradients(case.module(torch.float32), mse_sum, x, y + 1e4, engine=engine)


@pytest.mark.parametrize(
    "options",
    [{"engine": "nonesuch"}, {"loss_reduction": "none"}, {"loss_reduction": "Mean"}],
)
def test_unknown_choices_are_refused(engine: str, options: dict[str, str]) -> None:
    with pytest.raises(ParameterError):
        dpdl.per_sample_gradients(CASE.module(), F.cross_entropy, *CASE.batch(), **{"engine": engine, **options})


@pytest.mark.parametrize("max_grad_norm", [0.0, -1.0, float("nan"), -float("inf")])
def test_a_clipping_norm_out_of_range_is_refused(engine: str, max_grad_norm: float) -> None:
    with pytest.raises(ParameterError, match="max_grad_norm"):
        dpdl.clipped_sum(CASE.module(), F.cross_entropy, *CASE.batch(), engine=engine, max_grad_norm=max_grad_norm)
