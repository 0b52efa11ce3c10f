"""Each way to use the library wrongly is refused before anything is spent, or is harmless; the page says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpdl.errors import StepError
from tests.misuse.case import Case, Trial, first_sentence
from tests.misuse.cases import CASES
from tests.misuse.page import markdown, row_of, rows_of
from tests.small_run import small_run

PAGE = Path(__file__).parents[2] / "docs" / "misuse.md"
AT_LEAST = 100


def marked(case: Case) -> object:
    marks = [pytest.mark.xfail(strict=True, reason=case.fails)] if case.fails else []
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # os.fork, and torch of its own functions
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_is_refused_before_anything_is_spent_or_harmless(case: Case) -> None:
    case.run()


def test_there_are_enough_and_no_two_are_the_same() -> None:
    assert len(CASES) >= AT_LEAST
    assert len({case.tried for case in CASES}) == len(CASES)


def test_the_page_is_up_to_date() -> None:
    """Written by `python -m tests.misuse --markdown docs/misuse.md`."""
    page = PAGE.read_text()
    assert list(rows_of(page)) == [row_of(case) for case in CASES]
    outcomes = {case.name: case.outcome_as_declared() for case in CASES}
    counted = markdown(outcomes, CASES).split("\n##")[0]
    assert page.startswith(counted), "the counts at its head"


# ── the cases' own tools notice what they should ────────────────────────────────────────────────────


def test_a_refusal_that_changes_something_is_noticed(tmp_path: Path) -> None:
    private = small_run()

    def half_done() -> None:
        with torch.no_grad():
            next(private.model.parameters()).add_(1)
        raise StepError("too late")

    with pytest.raises(AssertionError, match="changed something"), Trial(StepError, tmp_path).refused(private):
        half_done()


def test_nothing_refused_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nothing was refused"), Trial(StepError, tmp_path).refused():
        pass


def test_errors_of_other_kinds_come_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="torch"), Trial(StepError, tmp_path).refused():
        raise RuntimeError("of torch")


def test_a_spent_step_is_noticed(tmp_path: Path) -> None:
    private = small_run(noise_multiplier=1.0)

    def half_done() -> None:
        private.optimizer.ledger.record(private.optimizer.plan.event(1))
        raise StepError("too late")

    with pytest.raises(AssertionError, match="changed something"), Trial(StepError, tmp_path).refused(private):
        half_done()


def test_first_sentences() -> None:
    assert first_sentence("A is 1.5. B.") == "A is 1.5."
    assert first_sentence("optimizer.step() before (0.1): no.\n Call it.") == "optimizer.step() before (0.1): no."
    assert first_sentence("no full stop") == "no full stop"
