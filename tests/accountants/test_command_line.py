"""`python -m accountants`, in a process where torch cannot be imported."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

import accountants
from accountants import cli

PLAN = ["--noise-multiplier", "1.1", "--delta", "1e-5"]
SIZES = ["--batch-size", "256", "--dataset-size", "60000"]


@pytest.fixture
def run(tmp_path: pathlib.Path):  # type: ignore[no-untyped-def]
    """Run the module with a torch on the path that refuses to be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('accountants must not need torch')\n")
    root = pathlib.Path(accountants.__file__).parents[1]
    environment = {"PYTHONPATH": f"{tmp_path}:{root}", "PATH": "", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}

    def call(*arguments: str, module: str = "accountants") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return call


def test_table_names_bounds_delta_sampling_and_relation(run) -> None:  # type: ignore[no-untyped-def]
    result = run("epsilon", *PLAN, *SIZES, "--epochs", "60")
    assert result.returncode == 0, result.stderr
    for words in ("epsilon", "not below", "1e-05", "Poisson", "adding or removing one example", "14100"):
        assert words in result.stdout


def test_torch_is_blocked_in_these_tests(run) -> None:  # type: ignore[no-untyped-def]
    assert "must not need torch" in run(module="torch").stderr


def test_bad_values_are_one_line_and_exit_code_2(run) -> None:  # type: ignore[no-untyped-def]
    for arguments in (
        ["epsilon", "--noise-multiplier", "-1", "--delta", "1e-5", "--sample-rate", "0.1", "--steps", "1"],
        ["epsilon", "--noise-multiplier", "x"],
    ):
        result = run(*arguments)
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1
        assert "error:" in result.stderr
        assert result.stdout == ""


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert cli.main([*arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_json_is_the_library_to_the_last_bit(capsys: pytest.CaptureFixture[str]) -> None:
    record = answer(capsys, "epsilon", *PLAN, *SIZES, "--epochs", "2")
    expected = accountants.interval(noise_multiplier=1.1, sample_rate=256 / 60_000, steps=470, delta=1e-5)
    assert (record["epsilon_lower"], record["epsilon"]) == expected
    assert record["steps"] == 470  # 2 * ceil(60000 / 256)


def test_calibrate_and_steps_answer_on_the_safe_side(capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["--epsilon", "2", "--delta", "1e-5", "--sample-rate", "0.02"]
    assert answer(capsys, "calibrate", *budget, "--steps", "500")["epsilon"] <= 2
    record = answer(capsys, "steps", *budget, "--noise-multiplier", "1.2")
    assert record["epsilon"] <= 2
    assert record["steps"] > 0


def test_no_noise_is_null_in_json_and_words_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["epsilon", "--noise-multiplier", "0", "--delta", "1e-5", "--sample-rate", "1", "--steps", "1"]
    assert answer(capsys, *plan)["epsilon"] is None
    assert cli.main(plan) == 0
    assert "no privacy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "extra",
    [
        ["--sample-rate", "0.1"],
        ["--sample-rate", "0.1", "--steps", "1", "--epochs", "1"],
        ["--sample-rate", "0.1", "--batch-size", "3", "--steps", "1"],
        ["--batch-size", "3", "--steps", "1"],
        ["--batch-size", "9", "--dataset-size", "3", "--steps", "1"],
        ["--sample-rate", "0.1", "--epochs", "1"],
        ["--sample-rate", "0.1", "--steps", "1", "--accountant", "clt"],
        ["--sample-rate", "0.1", "--steps", "1", "--relation", "swap"],
        ["--sample-rate", "0.1", "--steps", "1", "--relation", "replace_one"],
    ],
    ids=" ".join,
)
def test_contradictions_are_refused(extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["epsilon", *PLAN, *extra]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("value", [2.00001, 0.0123456789, 1234.56789, 1e-9, 6.187712390])
def test_displayed_bounds_round_outwards(value: float) -> None:
    shown = cli._bounds(accountants.Interval(value, value))
    upper, lower = shown.removeprefix("<= ").split(", and not below ")
    assert float(lower) <= value <= float(upper)
    assert float(upper) - float(lower) <= 2e-4 * value


def test_import_is_light_and_needs_neither_torch_nor_scipy_stats() -> None:
    code = "import accountants, sys; print([m for m in ('torch', 'dpdl', 'scipy.stats') if m in sys.modules])"
    root = pathlib.Path(accountants.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "[]", result.stderr
