"""Sweeps: rows, their repetition, failures, what is refused, and what is said about looking."""

from __future__ import annotations

import csv
import json
import math
import operator
from pathlib import Path
from typing import Any

import pytest

from accountants import Gaussian, PRVAccountant
from dpdl.errors import CheckpointError, ParameterError
from dpdl.tradeoff import Point, SweepResult
from dpdl.tradeoff.journal import JOURNAL
from tests.tradeoff import small_training
from tests.tradeoff.small_training import small


def scores(result: SweepResult) -> list[float | None]:
    return [row.score for row in result.rows]


def test_each_row_carries_the_epsilon_of_its_own_report() -> None:
    result = small()
    assert [(row.target, row.seed) for row in result.rows] == [
        (1.0, 0), (1.0, 1), (4.0, 0), (4.0, 1), (math.inf, 0), (math.inf, 1),
    ]  # fmt: skip
    for row in result.rows[:4]:
        assert row.target is not None
        assert row.epsilon is not None
        assert 0.99 * row.target < row.epsilon <= row.target
        assert row.report is not None
        assert row.report["epsilon"] == row.epsilon
        assert row.secure
    for row in result.rows[4:]:
        assert row.epsilon == math.inf
        assert not row.private
        assert row.report is not None
        assert row.report["claim"].startswith("NO GUARANTEE")


def test_all_rows_together_cost_the_composition_of_all_their_steps() -> None:
    result = small()
    one, four = result.rows[0], result.rows[2]
    accountant = PRVAccountant()
    for row in (one, four):
        accountant = accountant.compose(Gaussian(row.noise_multiplier), 2 * row.steps)
    assert result.epsilon_of_all == pytest.approx(accountant.epsilon(1e-3), rel=1e-6)
    assert result.epsilon_of_all > 4.0
    assert any("picking the best of the 4 private rows" in remark for remark in result.remarks)


def test_an_insecure_seed_repeats_every_row_and_other_seeds_do_not() -> None:
    first, again, other = (scores(small(insecure_seed=seed, threads=1)) for seed in (7, 7, 8))
    assert first == again
    assert all(a != b for a, b in zip(first[:4], other[:4], strict=True))


def test_without_one_the_noise_is_fresh_and_only_first_weights_repeat() -> None:
    first, again = scores(small()), scores(small())
    assert all(a != b for a, b in zip(first[:4], again[:4], strict=True))
    assert first[4:] == again[4:]  # every record in each batch, and no noise


def test_two_runs_of_an_insecure_sweep_never_share_their_noise() -> None:
    seeds: list[int | None] = []

    def note(point: Point) -> Any:
        seeds.append(point.execution.insecure_seed)
        return small_training.train(point)

    small(note, insecure_seed=7)
    assert len(set(seeds)) == len(seeds) == 6
    assert None not in seeds


@pytest.mark.slow  # one with two jobs that was killed is compared with one after another, too: test_resume
def test_side_by_side_is_as_one_after_another() -> None:
    serial = small(insecure_seed=7, threads=1)
    parallel = small(insecure_seed=7, threads=1, jobs=2)
    assert scores(serial) == scores(parallel)
    assert serial.epsilon_of_all == parallel.epsilon_of_all


def test_a_run_leaves_the_generator_of_the_caller_alone() -> None:
    import torch

    before = torch.get_rng_state()
    small(epsilons=(1.0,), seeds=(3,))
    assert torch.equal(before, torch.get_rng_state())


def test_a_run_that_fails_is_a_row_and_counts_among_what_was_spent() -> None:
    whole, broken = small(), small(small_training.train_or_fail)
    assert [row.failed for row in broken.rows] == [False, True] * 3
    assert broken.failed[0].error is not None
    assert broken.failed[0].error.startswith("RuntimeError: no such luck (small_training.py, line ")
    assert broken.failed[0].epsilon is None
    assert broken.epsilon_of_all == whole.epsilon_of_all
    assert [group.runs for group in broken.summaries] == [1, 1, 1]


def test_a_process_that_dies_takes_one_run_with_it() -> None:
    result = small(small_training.train_or_die, epsilons=(1.0,), baseline=False, seeds=(1, 0, 2), jobs=2, threads=1)
    assert [row.failed for row in result.rows] == [True, False, False]
    assert "exit code 3" in str(result.failed[0].error)


@pytest.mark.parametrize(
    ("train", "word"), [(small_training.train_another, "delta"), (small_training.report_of_nothing, "returned float")]
)
def test_a_row_without_the_report_of_its_plan_fails(train: Any, word: str) -> None:
    result = small(train, epsilons=(1.0,), seeds=(0,), baseline=False)
    assert word in str(result.rows[0].error)
    assert result.rows[0].epsilon is None


WRONG = [
    ({"epsilons": ()}, "epsilons is empty"),
    ({"epsilons": (1.0, -1.0)}, "positive finite numbers"),
    ({"epsilons": (1.0, 1.0)}, "one value twice"),
    ({"epsilons": 1.0}, "must be a list"),
    ({"delta": 0.0}, "delta must be in"),
    ({"epochs": None}, "epochs is missing"),
    ({"epochs": 0}, "epochs"),
    ({"batch_sizes": (20, 41)}, "41 is more than the 40 examples"),
    ({"max_grad_norms": (math.inf,)}, "max_grad_norms"),
    ({"lrs": ("fast",)}, "lrs"),
    ({"seeds": ()}, "seeds is empty"),
    ({"seeds": (-1,)}, "seeds must hold"),
    ({"baseline": "no"}, "baseline must be"),
    ({"baseline": False, "baseline_lrs": (1.0,)}, "baseline_lrs"),
    ({"settings": {"a": object()}}, "JSON"),
    ({"settings": {"a": (1, 2)}}, "JSON"),
    ({"held_out": "mine"}, "held_out must be"),
    ({"engine": "fast"}, "engine must be"),
    ({"insecure_seed": -1}, "insecure_seed"),
    ({"jobs": 0}, "jobs"),
    ({"threads": 0}, "threads"),
    ({"threads": 10**12}, "at most 1,024"),
    ({"seeds": range(10**30)}, "more than 100,000 values"),
    ({"seeds": range(50_000)}, "would be 150,000 runs"),
    ({"epochs": 10**19}, "at most 10"),
    ({"epsilons": (math.nan,)}, "NaN"),
    ({"delta": 1e-320}, "at least 1e-300"),
    ({"train": 3}, "train must be a function"),
    ({"train": lambda point: None, "jobs": 2}, "cannot be sent to another process"),
    ({"resume": True, "output": None}, "needs the output folder"),
]


@pytest.mark.parametrize(("changed", "word"), WRONG, ids=[word for _, word in WRONG])
def test_bad_arguments_are_refused_before_anything_is_spent(changed: dict[str, Any], word: str, tmp_path: Path) -> None:
    def train(point: Point) -> Any:
        raise AssertionError("a run was begun")

    output = tmp_path / "out"
    with pytest.raises(ParameterError, match=word):
        small(**{"train": train, "output": output, **changed})
    assert not output.exists()


def test_plans_are_taken_as_they_are_and_nothing_beside_them() -> None:
    from dpdl.plan import PrivacyPlan

    plan = PrivacyPlan(sample_rate=1.0, expected_batch_size=40, steps=2, noise_multiplier=2.0, max_grad_norm=0.5)
    nothing: dict[str, Any] = {name: () for name in ("epsilons", "max_grad_norms", "batch_sizes")}
    result = small(**nothing, dataset_size=None, epochs=None, plans=(plan,), seeds=(0,))
    assert [row.noise_multiplier for row in result.rows] == [2.0, 0.0]
    assert result.rows[0].epsilon == plan.epsilon(1e-3)
    with pytest.raises(ParameterError, match="leave out dataset_size, epochs"):
        small(**nothing, plans=(plan,))


def test_a_function_that_another_process_cannot_load_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="cannot be loaded in another process"):
        small(Unloadable(), jobs=2, output=tmp_path)
    assert "begun" not in (tmp_path / JOURNAL).read_text()


class Unloadable:
    """Can be sent, and not be received."""

    def __reduce__(self) -> Any:
        return (operator.attrgetter("not_there"), (0,))

    def __call__(self, point: Point) -> Any:
        raise NotImplementedError


def test_csv_and_json_hold_every_row_and_what_looking_costs(tmp_path: Path) -> None:
    result = small(small_training.train_or_fail)
    result.to_csv(tmp_path / "rows.csv")
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    remarks = [line for line in lines if line.startswith("# ")]
    assert sum("icking the best" in line for line in remarks) == 1
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [row["key"] for row in rows] == [row.key for row in result.rows]
    asked = [
        "key",
        "private",
        "target",
        "epsilon",
        "planned_epsilon",
        "delta",
        "noise_multiplier",
        "sample_rate",
        "steps",
    ]
    asked += ["max_grad_norm", "batch_size", "lr", "seed", "score", "secure", "seconds", "error", "metric_seed"]
    assert list(rows[0]) == asked
    assert float(rows[0]["epsilon"]) == result.rows[0].epsilon
    assert rows[1]["epsilon"] == rows[1]["score"] == ""
    assert rows[4]["epsilon"] == "inf"

    found = json.loads(result.to_json(tmp_path / "sweep.json"))
    assert json.loads((tmp_path / "sweep.json").read_text()) == found
    assert found["schema"] == "dpdl.sweep/1"
    assert found["epsilon_of_all"] == result.epsilon_of_all
    assert [row["error"] is None for row in found["rows"]] == [True, False] * 3
    assert found["summaries"][0]["mean"] == result.rows[0].score
    assert any("Picking the best of the 4 private rows" in remark for remark in found["remarks"])


def test_the_table_says_mean_and_spread_and_rounds_epsilon_up() -> None:
    from rich.console import Console

    result = small()
    console = Console(width=200)
    with console.capture() as capture:
        console.print(result.table())
    text = capture.get()
    first = result.summaries[0]
    assert first.sd == pytest.approx(abs(scores(result)[0] - scores(result)[1]) / math.sqrt(2))  # type: ignore[operator]
    assert f"{first.mean:.4f} ± {first.sd:.4f}" in text
    assert "<= 1.00" in text
    assert "no guarantee" in text
    assert "icking the best" in text


def test_a_secret_held_out_part_and_the_baseline_are_named_in_the_remarks() -> None:
    assert any("which no epsilon here protects" in remark for remark in small().remarks)
    assert any("taken as public" in remark for remark in small(held_out="public").remarks)
    assert any("non-private line has no guarantee" in remark for remark in small().remarks)
    assert not any("non-private line" in remark for remark in small(baseline=False).remarks)
    assert any("insecure_seed" in remark for remark in small(insecure_seed=1).remarks)


def test_what_runs_save_has_a_folder_of_its_own(tmp_path: Path) -> None:
    result = small(output=tmp_path)
    for row in result.rows:
        assert (tmp_path / "runs" / row.key / "weights.txt").read_text() == repr(row.score)


def test_a_folder_with_a_sweep_is_refused_unless_resumed(tmp_path: Path) -> None:
    small(output=tmp_path)
    before = (tmp_path / JOURNAL).read_bytes()
    with pytest.raises(CheckpointError, match="holds a sweep already"):
        small(output=tmp_path)
    assert (tmp_path / JOURNAL).read_bytes() == before
