"""`python -m accountants`: in a process where neither torch nor matplotlib can be imported, and called directly."""

from __future__ import annotations

import json
import math
import pathlib
import shlex
import subprocess
import sys
from typing import get_args

import pytest

import accountants
from accountants import cli
from accountants.commands import plan_options, rounding
from accountants.queries import AccountantName

PLAN = ["--noise-multiplier", "1.1", "--delta", "1e-5"]
SIZES = ["--batch-size", "256", "--dataset-size", "60000"]


@pytest.fixture
def run(tmp_path: pathlib.Path):  # type: ignore[no-untyped-def]
    """Run the module with a torch and a matplotlib on the path that refuse to be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('accountants must not need torch')\n")
    (tmp_path / "matplotlib.py").write_text("raise ImportError('only figures may need matplotlib')\n")
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


def test_torch_and_matplotlib_are_blocked_in_these_tests(run) -> None:  # type: ignore[no-untyped-def]
    assert "must not need torch" in run(module="torch").stderr
    assert "only figures may need" in run(module="matplotlib").stderr


def test_explain_and_curve_need_neither_torch_nor_matplotlib(run) -> None:  # type: ignore[no-untyped-def]
    for command in ("explain", "curve"):
        result = run(command, *PLAN, "--sample-rate", "0.1", "--steps", "2", "--accountant", "rdp")
        assert result.returncode == 0, result.stderr
        assert "adding or removing one example" in result.stdout


def test_a_plot_without_matplotlib_names_the_extra(run, tmp_path: pathlib.Path) -> None:  # type: ignore[no-untyped-def]
    for command in ("explain", "curve"):
        file = tmp_path / f"{command}.png"
        result = run(command, *PLAN, "--sample-rate", "1", "--steps", "2", "--plot", str(file))
        assert result.returncode == 2
        assert "pip install 'dpdl[plots]'" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not file.exists()


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
    ],
    ids=" ".join,
)
def test_contradictions_are_refused(extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["epsilon", *PLAN, *extra]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_curve_shows_the_library_s_epsilons_and_ends_at_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["curve", *PLAN, *SIZES, "--epochs", "2", "--points", "4"]
    record = answer(capsys, *plan)
    assert record["steps"] == [118, 235, 353, 470]
    expected = accountants.epsilon_curve(
        noise_multiplier=1.1, sample_rate=256 / 60_000, steps=record["steps"], delta=1e-5
    )
    assert record["epsilon"] == expected.tolist()
    assert cli.main(plan) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:5]]
    assert [int(steps) for steps, _ in table] == record["steps"]
    for (_, shown), epsilon in zip(table, record["epsilon"], strict=True):
        assert epsilon <= float(shown) <= epsilon + 1e-4 * max(1, epsilon)


def test_curve_has_as_many_points_as_there_are_steps_at_most(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["curve", *PLAN, "--sample-rate", "1", "--steps"]
    assert answer(capsys, *plan, "3")["steps"] == [1, 2, 3]  # a count of 0 is not a release
    assert len(answer(capsys, *plan, "1000")["steps"]) == 20
    assert cli.main([*plan, "10", "--points", "0"]) == 2


def test_explain_says_in_words_what_json_says_in_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["explain", "--noise-multiplier", "2", "--delta", "1e-5", "--sample-rate", "1", "--steps", "4"]
    record = answer(capsys, *plan)  # one Gaussian of noise 1
    assert record["advantage"] == pytest.approx(0.3829249225, abs=1e-9)
    rates = {at["false_positive_rate"]: at["true_positive_rate"] for at in record["true_positive_rates"]}
    assert rates == pytest.approx({1e-2: 0.0923622481, 1e-3: 0.0182984684}, abs=1e-9)
    half, rare = record["priors"]
    assert (half["prior"], rare["prior"]) == (0.5, 0.01)
    assert half["bayes_accuracy"] == pytest.approx(0.5 + 0.3829249225 / 2)
    right = {at["false_positive_rate"]: at["positive_predictive_value"] for at in rare["positive_predictive_values"]}
    assert right[1e-2] == pytest.approx(0.0923622481 / (0.0923622481 + 99 * 0.01))
    assert {at["baseline"]: at["success"] for at in record["reconstruction"]}[1e-2] == rates[1e-2]
    assert record["epsilon"] == pytest.approx(4.3771779, rel=1e-6)
    twice = accountants.epsilon(noise_multiplier=0.5, sample_rate=1, steps=1, delta=1e-5)
    assert record["groups"][0] == {"size": 2, "epsilon": pytest.approx(twice), "epsilon_lower": pytest.approx(twice)}
    assert cli.main(plan) == 0
    text = capsys.readouterr().out
    for words in ("epsilon    <= 4.3772", "38.3 %", "9.237 %", "1.83 %", "69.1463 %", "adding or removing one example"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100


def test_no_noise_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["explain", "--noise-multiplier", "0", "--delta", "1e-5", "--sample-rate", "1", "--steps", "1"]
    record = answer(capsys, *plan)
    assert record["epsilon"] is None
    assert record["unbounded"] is True
    assert record["advantage"] == 1
    assert cli.main(plan) == 0
    assert "no privacy" in capsys.readouterr().out
    curve = answer(capsys, "curve", *plan[1:])
    assert curve["epsilon"] == [None]
    assert curve["unbounded"] is True


@pytest.mark.parametrize("command", ["curve", "explain"])
@pytest.mark.parametrize("noise", ["1.1", "0"])
def test_plots_are_written_and_nothing_is_shown(
    command: str, noise: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    plan = [command, "--noise-multiplier", noise, "--delta", "1e-5", "--sample-rate", "1", "--steps", "5"]
    before = set(sys.modules)
    for suffix, head in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        file = tmp_path / f"figure{suffix}"
        assert cli.main([*plan, "--plot", str(file)]) == 0
        assert file.read_bytes().startswith(head)
    assert "matplotlib.pyplot" not in set(sys.modules) - before, "pyplot opens windows and keeps figures"
    for bad in (tmp_path / "missing" / "figure.png", tmp_path / "figure.nonsense"):
        assert cli.main([*plan, "--plot", str(bad)]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["epsilon", "curve", "explain"])
def test_an_estimate_is_refused_by_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = [command, *PLAN, "--sample-rate", "0.1", "--steps", "10", "--accountant", "gdp"]
    assert cli.main(plan) == 2
    assert capsys.readouterr().out == ""


def test_rate_answers_on_the_safe_side_and_gives_the_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["rate", "--epsilon", "2", *PLAN, "--steps", "500", "--dataset-size", "60000"]
    record = answer(capsys, *plan)
    assert record["epsilon"] <= 2
    assert record["epsilon"] > 1.99
    assert record["batch_size"] == int(record["sample_rate"] * 60_000)
    assert cli.main(plan) == 0
    assert f"{record['batch_size']} expected" in capsys.readouterr().out
    assert cli.main([*plan[:-1], "0"]) == 2


def shown(output: str, label: str) -> str:
    """What a table says beside `label`."""
    return next(line.removeprefix(label).strip() for line in output.splitlines() if line.startswith(label))


@pytest.mark.parametrize(
    ("noise", "steps"),
    [("0.87654321", 37), ("2.7182818", 8_000), ("1.0", 8_000), ("1.1", 37), ("3.0", 37), ("3.0", 8_000)],
)
def test_the_rate_and_the_noise_as_printed_keep_to_the_budget(
    noise: str, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["--epsilon", "1.5", "--noise-multiplier", noise, "--delta", "1e-6", "--steps", str(steps)]
    assert cli.main(["rate", *plan]) == 0
    output = capsys.readouterr().out
    copied = {
        "noise_multiplier": float(shown(output, "noise multiplier")),
        "sample_rate": float(shown(output, "sampling").removeprefix("Poisson, rate ")),
        "steps": int(shown(output, "steps")),
    }
    assert accountants.epsilon(**copied, delta=1e-6) <= 1.5
    assert accountants.epsilon(**copied | {"noise_multiplier": float(noise) * 0.9999}, delta=1e-6) > 1.5


def test_the_noise_and_the_rate_as_printed_by_calibrate_keep_to_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    for size in (59_999, 7_000, 123_457):
        sizes = ["--batch-size", "256", "--dataset-size", str(size)]
        assert cli.main(["calibrate", "--epsilon", "2", "--delta", "1e-6", "--steps", "900", *sizes]) == 0
        output = capsys.readouterr().out
        rate = float(shown(output, "sampling").removeprefix("Poisson, rate "))
        noise = float(shown(output, "noise multiplier"))
        assert accountants.epsilon(noise_multiplier=noise, sample_rate=rate, steps=900, delta=1e-6) <= 2
        assert rate == pytest.approx(256 / size, rel=1e-5)


def test_a_batch_below_one_example_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["rate", "--epsilon", "2", *PLAN, "--steps", "500", "--dataset-size", "10"]
    assert cli.main(plan) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no whole batch fits" in printed.err
    assert len(printed.err.strip().splitlines()) == 1


@pytest.mark.parametrize("size", [3, 10, 49, 60_000, 10**17 + 1])
def test_the_batch_is_the_largest_whose_rate_is_affordable(size: int) -> None:
    just_below = [math.nextafter(count / size, 0) for count in range(2, min(size, 50))]  # where products round up
    for rate in (0.34, 0.7, 1.0, *just_below):
        if rate * size > 1.5:
            batch = plan_options.whole_batch(rate, size)
            assert batch / size <= rate
            assert (batch + 1) / size >= rate


def test_json_carries_the_budget_of_those_who_gave_one(capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["--epsilon", "2", "--delta", "1e-5"]
    assert answer(capsys, "calibrate", *budget, "--sample-rate", "0.02", "--steps", "50")["budget_epsilon"] == 2
    noise = ["--noise-multiplier", "1.1"]
    assert answer(capsys, "steps", *budget, *noise, "--sample-rate", "0.02")["budget_epsilon"] == 2
    assert answer(capsys, "rate", *budget, *noise, "--steps", "50")["budget_epsilon"] == 2
    assert "budget_epsilon" not in answer(capsys, "epsilon", *PLAN, "--sample-rate", "0.02", "--steps", "50")


COMMANDS = ["epsilon", "calibrate", "steps", "rate", "curve", "explain"]


def help_of(capsys: pytest.CaptureFixture[str], main, *command: str) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("program", ["python -m accountants", "dpdl"])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_each_help_can_be_pasted(
    command: str,
    program: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    main = cli.main if program != "dpdl" else pytest.importorskip("dpdl.cli").main
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.chdir(tmp_path)
    line = help_of(capsys, main, command).splitlines()[-1]
    assert line.startswith(f"example: {program} {command} ")
    assert main(shlex.split(line.removeprefix(f"example: {program} "))) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_accountant(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of(capsys, cli.main, command).split())
    assert ", ".join(get_args(AccountantName)) in text


def test_usage_errors_under_dpdl_are_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    main = pytest.importorskip("dpdl.cli").main
    for wrong in (["epsilon", "--noise-multiplier", "x"], ["rate"], ["nonsense"], [], ["train", "--epochs", "few"]):
        with pytest.raises(SystemExit) as left:
            main(wrong)
        assert left.value.code == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1
        assert error.startswith("dpdl")
        assert "error:" in error


@pytest.mark.parametrize("value", [2.00001, 0.0123456789, 1234.56789, 1e-9, 6.187712390])
def test_displayed_bounds_round_outwards(value: float) -> None:
    text = rounding.bounds(accountants.Interval(value, value))
    upper, lower = text.removeprefix("<= ").split(", and not below ")
    assert float(lower) <= value <= float(upper)
    assert float(upper) - float(lower) <= 2e-4 * value


@pytest.mark.parametrize("share", [0.0, 1e-12, 3.33333e-7, 0.0123456789, 0.5, 0.99999999, 1.0])
def test_displayed_percentages_round_up_but_not_beyond_all(share: float) -> None:
    percentage = float(rounding.percent_up(share).removesuffix(" %")) / 100
    assert share <= percentage * (1 + 1e-15)
    assert percentage <= min(share * 1.001, 1)


@pytest.mark.parametrize("share", [0.1, 0.7, 0.07, 0.0123, 1e-9, 3e-5, 0.9999])
def test_a_short_percentage_is_not_rounded_away_from_itself(share: float) -> None:
    assert float(rounding.percent_up(share).removesuffix(" %")) == pytest.approx(100 * share, rel=1e-14)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-9, "1e-09"), (1.23456789e-7, "1.2346e-07"), (9.87654e12, "9.8766e+12"), (724_848.2, "724850"), (0.0, "0")],
)
def test_huge_and_small_numbers_have_one_style(value: float, text: str) -> None:
    assert rounding.rounded_up(value) == text


def test_small_percentages_have_the_style_of_small_numbers() -> None:
    assert rounding.percent_up(1e-11) == f"{rounding.rounded_up(1e-9)} %"
    assert rounding.percent_up(1.2345e-8) == f"{rounding.rounded_up(1.2345e-6, 4)} %" == "1.235e-06 %"


def test_import_is_light_and_needs_neither_torch_nor_scipy_stats() -> None:
    code = "import accountants, sys; print([m for m in ('torch', 'dpdl', 'scipy.stats') if m in sys.modules])"
    root = pathlib.Path(accountants.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "[]", result.stderr
