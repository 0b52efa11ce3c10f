"""`python -m accountants`: in a process where neither torch nor matplotlib can be imported, and called directly."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

import accountants
from accountants import cli
from accountants.commands import rounding

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


@pytest.mark.parametrize("value", [2.00001, 0.0123456789, 1234.56789, 1e-9, 6.187712390])
def test_displayed_bounds_round_outwards(value: float) -> None:
    shown = rounding.bounds(accountants.Interval(value, value))
    upper, lower = shown.removeprefix("<= ").split(", and not below ")
    assert float(lower) <= value <= float(upper)
    assert float(upper) - float(lower) <= 2e-4 * value


@pytest.mark.parametrize("share", [0.0, 1e-12, 3.33333e-7, 0.0123456789, 0.5, 0.99999999, 1.0])
def test_displayed_percentages_round_up_but_not_beyond_all(share: float) -> None:
    shown = float(rounding.percent_up(share).removesuffix(" %")) / 100
    assert share <= shown * (1 + 1e-15)
    assert shown <= min(share * 1.001, 1)


def test_import_is_light_and_needs_neither_torch_nor_scipy_stats() -> None:
    code = "import accountants, sys; print([m for m in ('torch', 'dpdl', 'scipy.stats') if m in sys.modules])"
    root = pathlib.Path(accountants.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "[]", result.stderr
