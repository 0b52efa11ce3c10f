"""`Execution` takes what it can carry out, and nothing in it changes what is promised."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import dpdl
from dpdl.errors import ParameterError
from tests.small_run import small_run


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("engine", "hooks", "one of"),
        ("engine", None, "one of"),
        ("compile", True, "Leave it False"),
        ("loss_reduction", "none", "Reduce the loss"),
        ("loss_reduction", None, "Reduce the loss"),
        ("max_physical_batch_size", 0, "positive integer"),
        ("max_physical_batch_size", -3, "positive integer"),
        ("max_physical_batch_size", 2.0, "positive integer"),
        ("max_physical_batch_size", True, "positive integer"),
        ("max_physical_batch_size", "8", "positive integer"),
        ("chunk_size", 0, "positive integer"),
        ("chunk_size", 1.5, "positive integer"),
        ("accumulate_dtype", torch.float16, "float32 or torch.float64"),
        ("accumulate_dtype", torch.bfloat16, "float32 or torch.float64"),
        ("accumulate_dtype", "float32", "float32 or torch.float64"),
        ("insecure_seed", -1, "non-negative integer"),
        ("insecure_seed", True, "non-negative integer"),
        ("insecure_seed", 1.0, "non-negative integer"),
        ("insecure_seed", "7", "non-negative integer"),
    ],
)
def test_values_that_cannot_be_carried_out_are_refused(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(ParameterError, match=name) as caught:
        dpdl.Execution(**{name: value})
    assert remedy in str(caught.value)


@pytest.mark.parametrize("name", ["max_physical_batch_size", "chunk_size", "insecure_seed"])
def test_integers_of_numpy_are_taken(name: str) -> None:
    assert getattr(dpdl.Execution(**{name: np.int64(8)}), name) == 8


def test_an_execution_cannot_be_changed_after_it_is_made() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        dpdl.Execution().insecure_seed = 3  # type: ignore[misc]


def test_randomness_is_secure_unless_a_seed_is_asked_for() -> None:
    assert dpdl.Execution().insecure_seed is None
    assert dpdl.Execution().self_check


@pytest.mark.parametrize(
    "execution",
    [{"engine": "loop"}, {"max_physical_batch_size": 1}, {"chunk_size": 1}, {"accumulate_dtype": torch.float32}],
    ids=str,
)
def test_no_field_changes_the_plan_or_its_epsilon(execution: dict[str, Any]) -> None:
    plain, other = small_run(noise_multiplier=1.0), small_run(noise_multiplier=1.0, **execution)
    assert plain.optimizer.plan == other.optimizer.plan
    assert plain.optimizer.plan.event() == other.optimizer.plan.event()
