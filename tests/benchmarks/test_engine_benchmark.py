"""The engine benchmark can run: its models train, and its gauges read what is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.engine_candidates import FLOOR, NOISE, PLAIN, build_step
from benchmarks.engine_memory import process_peak, tensor_peak
from benchmarks.engine_models import CASES, OVERHEAD, Case, case_named
from benchmarks.engine_targets import TIME
from benchmarks.engine_timing import measure

SIZE = 2  # examples
MILLION = 1_000_000

ALL = (*CASES, OVERHEAD)
BEYOND_VMAP = {"lstm"}  # torch has no batching rule for aten::lstm


def moved(case: Case, candidate: str) -> list[bool]:
    """Which parameters one step of a candidate moves."""
    step = build_step(candidate, case, SIZE)
    before = [p.detach().clone() for p in step.module.parameters()]
    step.run()
    return [not torch.equal(a, b) for a, b in zip(before, step.module.parameters(), strict=True)]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
@pytest.mark.parametrize("candidate", [PLAIN, "loop"])
def test_step_of_every_model_moves_its_parameters(case: Case, candidate: str) -> None:
    assert any(moved(case, candidate))


@pytest.mark.parametrize("case", [c for c in ALL if c.name not in BEYOND_VMAP], ids=lambda case: case.name)
def test_private_step_by_vmap_moves_all_parameters(case: Case) -> None:
    assert all(moved(case, "vmap"))


def test_every_case_has_a_target() -> None:
    assert {case.name for case in CASES} == set(TIME)


def test_tied_language_model_has_one_table_less() -> None:
    untied, tied = (sum(p.numel() for p in case_named(name).build().parameters()) for name in ("gpt", "gpt-tied"))
    assert untied - tied == 8192 * 256


def test_tensor_peak_is_exact_on_a_known_case() -> None:
    def run() -> None:
        first, second = torch.ones(MILLION), torch.ones(2 * MILLION)
        del first
        third = torch.ones(MILLION // 2)  # beside the second: 10 MB, less than the 12 MB before
        del second, third

    assert tensor_peak(run) == 12 * MILLION


def test_process_peak_sees_tensors_and_arrays_together() -> None:
    def run() -> None:
        tensor, array = torch.ones(4 * MILLION), np.ones(2 * MILLION)
        del tensor, array

    run()
    assert process_peak(run) == pytest.approx(32 * MILLION, rel=0.05)


def test_candidate_that_refuses_is_recorded_and_others_are_measured() -> None:
    outcomes = measure(case_named("logistic"), [PLAIN, FLOOR, NOISE, "no such"], size=SIZE, threads=1, repeats=1)
    assert outcomes["no such"].error == "KeyError: 'no such'"
    assert all(outcomes[name].timing is not None for name in (PLAIN, FLOOR, NOISE))
