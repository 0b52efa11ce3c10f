"""Every engine, every small model: gradients, norms and clipped sums against one-at-a-time autograd."""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch
from torch import Tensor

import dpdl
from dpdl.errors import ModelError
from tests.oracles import one_at_a_time as oracle
from tests.per_sample.case import ENGINES, N, SmallModel
from tests.per_sample.small_models import BY_NAME, SMALL_MODELS, TAKEN, name_of

# Sums of a few hundred products: rounding leaves about 1e-14 in float64 and 1e-6 in float32.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
REMEDY = "engine=['\"](loop|auto)['\"]"
DTYPES = (torch.float64, torch.float32)


each_engine = pytest.mark.parametrize("engine", ENGINES)
each_model = pytest.mark.parametrize("case", SMALL_MODELS, ids=name_of)
each_taken = pytest.mark.parametrize(("engine", "case"), TAKEN, ids=name_of)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@functools.cache
def true_gradients(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The oracle's gradients in float64, of the weights and data rounded to `dtype`."""
    case = BY_NAME[name]
    return oracle.per_sample_gradients(case.module(dtype), case.loss_fn, *case.batch(dtype))


def median_norm(name: str) -> float:
    """A clipping norm that clips about half of the examples."""
    return float(oracle.norms_of(true_gradients(name)).median()) * 1.01


def refuses(case: SmallModel, engine: str, error: ModelError) -> None:
    """Pass for a refusal that is allowed and says what to do; fail otherwise."""
    assert engine not in case.must_take, f"{engine} has to take {case.name}, but: {error}"
    assert re.search(REMEDY, str(error)), f"no remedy in: {error}"


def assert_norms_close(measured: Tensor, true: Tensor, tolerance: float) -> None:
    assert measured.shape == true.shape
    floor = 1e-3 * float(true.max()) if len(true) else 0.0
    error = (measured.double() - true).abs() / true.clamp(min=floor)
    assert float(error.max()) <= tolerance, error


@each_dtype
@each_engine
@each_model
def test_gradients_equal_one_at_a_time_autograd(engine: str, case: SmallModel, dtype: torch.dtype) -> None:
    inputs, targets = case.batch(dtype)
    try:
        measured = dpdl.per_sample_gradients(
            case.module(dtype),
            case.loss_fn,
            inputs,
            targets,
            engine=engine,
            loss_reduction=case.loss_reduction,
        )
    except ModelError as error:
        return refuses(case, engine, error)
    error, name = oracle.worst_error(measured, true_gradients(case.name, dtype))
    assert error <= TOLERANCE[dtype], (name, error)


@each_dtype
@each_engine
@each_model
def test_norms_equal_one_at_a_time_autograd(engine: str, case: SmallModel, dtype: torch.dtype) -> None:
    inputs, targets = case.batch(dtype)
    try:
        measured = dpdl.per_sample_norms(
            case.module(dtype),
            case.loss_fn,
            inputs,
            targets,
            engine=engine,
            loss_reduction=case.loss_reduction,
        )
    except ModelError as error:
        return refuses(case, engine, error)
    assert_norms_close(measured, oracle.norms_of(true_gradients(case.name, dtype)), TOLERANCE[dtype])


@each_dtype
@each_engine
@each_model
def test_clipped_sum_equals_one_at_a_time_autograd(engine: str, case: SmallModel, dtype: torch.dtype) -> None:
    inputs, targets = case.batch(dtype)
    max_grad_norm = median_norm(case.name)
    try:
        measured = dpdl.clipped_sum(
            case.module(dtype),
            case.loss_fn,
            inputs,
            targets,
            engine=engine,
            loss_reduction=case.loss_reduction,
            max_grad_norm=max_grad_norm,
        )
    except ModelError as error:
        return refuses(case, engine, error)
    true = oracle.clipped_sum_of(true_gradients(case.name, dtype), max_grad_norm)
    error, name = oracle.worst_error(measured, true)
    assert error <= TOLERANCE[dtype], (name, error)


@each_taken
def test_clipped_sum_without_a_limit_is_the_plain_sum(engine: str, case: SmallModel) -> None:
    measured = dpdl.clipped_sum(
        case.module(),
        case.loss_fn,
        *case.batch(),
        engine=engine,
        loss_reduction=case.loss_reduction,
        max_grad_norm=math.inf,
    )
    true = {name: g.sum(0) for name, g in true_gradients(case.name).items()}
    error, name = oracle.worst_error(measured, true)
    assert error <= 1e-9, (name, error)


@each_taken
def test_another_example_changes_nobody_elses_gradient(engine: str, case: SmallModel) -> None:
    replaced, by = 1, 3
    rows = torch.arange(N)
    rows[replaced] = by
    measured = dpdl.per_sample_gradients(
        case.module(),
        case.loss_fn,
        *case.batch(rows=rows),
        engine=engine,
        loss_reduction=case.loss_reduction,
    )
    true = true_gradients(case.name)
    error, name = oracle.worst_error(measured, {n: g[rows] for n, g in true.items()})
    assert error <= 1e-9, (name, error)
    others = [n for n in range(N) if n != replaced]
    error, name = oracle.worst_error(
        {n: g[others] for n, g in measured.items()}, {n: g[others] for n, g in true.items()}
    )
    assert error <= 1e-9, (name, error)


@each_taken
def test_a_batch_of_one_works(engine: str, case: SmallModel) -> None:
    measured = dpdl.per_sample_gradients(
        case.module(),
        case.loss_fn,
        *case.batch(rows=slice(2, 3)),
        engine=engine,
        loss_reduction=case.loss_reduction,
    )
    error, name = oracle.worst_error(measured, {n: g[2:3] for n, g in true_gradients(case.name).items()})
    assert error <= 1e-9, (name, error)


@each_taken
def test_an_empty_batch_gives_no_rows_and_a_sum_of_zero(engine: str, case: SmallModel) -> None:
    model = case.module()
    arguments = (model, case.loss_fn, *case.batch(rows=slice(0, 0)))
    options = {"engine": engine, "loss_reduction": case.loss_reduction}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}

    gradients = dpdl.per_sample_gradients(*arguments, **options)
    assert {name: tuple(g.shape) for name, g in gradients.items()} == {n: (0, *s) for n, s in shapes.items()}
    assert dpdl.per_sample_norms(*arguments, **options).shape == (0,)
    total = dpdl.clipped_sum(*arguments, **options, max_grad_norm=1.0)
    assert {name: tuple(t.shape) for name, t in total.items()} == shapes
    assert all(not t.any() for t in total.values())


@each_engine
def test_every_model_was_given_to_every_engine(engine: str) -> None:
    assert len(SMALL_MODELS) == len(BY_NAME) >= 36
    assert sum(engine in case.must_take for case in SMALL_MODELS) >= 36


@pytest.mark.parametrize("name", ["row_by_row_control_flow", "writes_into_fresh_tensor"])
def test_what_vmap_cannot_run_it_refuses_with_the_remedy(name: str) -> None:
    case = BY_NAME[name]
    with pytest.raises(ModelError, match=REMEDY):
        dpdl.per_sample_gradients(case.module(), case.loss_fn, *case.batch(), engine="vmap")
