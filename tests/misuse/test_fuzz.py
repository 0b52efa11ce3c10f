"""Random plans and corrupted inputs through the public API: an error of ours, or a right result.

Sixty by default, always the same; a thousand, each time others, with `-m slow`. Whatever is neither a
`dpdl.errors.PrivacyError` nor a result comes through and fails the test: a traceback from inside torch or numpy, above
all. What a result must satisfy is computed without the library: closed forms, one-at-a-time autograd, what was saved.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.misuse.fuzz_files import checkpoint, ledger_file, ledger_json, state_dict
from tests.misuse.fuzz_numbers import plan, plan_for_a_loader, plans_json, question
from tests.misuse.fuzz_runs import model_call, run
from tests.misuse.fuzzing import Fuzzer, ours

FUZZERS: dict[str, tuple[Fuzzer, int]] = {  # how many of about sixty
    "a plan": (plan, 9),
    "a plan for a loader": (plan_for_a_loader, 6),
    "a question to the accountants": (question, 9),
    "a plan's JSON": (plans_json, 5),
    "a run": (run, 7),
    "a batch": (model_call, 8),
    "a checkpoint": (checkpoint, 6),
    "a state": (state_dict, 6),
    "a ledger's JSON": (ledger_json, 4),
    "a ledger file": (ledger_file, 4),
}
MORE = 16  # times as many with -m slow: 1,024


def fuzz(name: str, times: int, *, always_the_same: bool) -> None:
    check, _ = FUZZERS[name]

    @settings(
        max_examples=times,
        deadline=None,
        database=None,
        derandomize=always_the_same,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            check(data)

    tried()


@pytest.mark.parametrize("name", FUZZERS)
def test_an_error_of_ours_or_a_right_result(name: str) -> None:
    fuzz(name, FUZZERS[name][1], always_the_same=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZERS)
def test_an_error_of_ours_or_a_right_result_a_thousand_times(name: str) -> None:
    fuzz(name, MORE * FUZZERS[name][1], always_the_same=False)


def test_a_foreign_error_comes_through() -> None:
    with pytest.raises(RuntimeError), ours():
        raise RuntimeError("of torch")
