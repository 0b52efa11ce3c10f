"""`dpdl train` as a user runs it: files, table, interruption, resumption, errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dpdl.cli import main
from dpdl.models import build_model

pytest.importorskip("mlxtend")

QUICK = ["--model", "logistic", "--epochs", "2", "--batch-size", "400", "--insecure-seed", "3"]


def test_a_run_leaves_weights_report_plot_and_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *QUICK, "--output", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    for word in ("test accuracy", "epsilon", "delta", "noise multiplier", "sampling", "relation", "unit"):
        assert word in table
    report = json.loads((tmp_path / "report.json").read_text())
    assert 0 < report["epsilon_lower"] <= report["epsilon"] <= 3.0
    assert report["steps"] == report["planned_steps"] == 20
    assert not report["secure_randomness"]
    assert any("insecure_seed" in note for note in report["notes"])
    history = report["training"]["history"]
    assert [p["epsilon"] for p in history] == sorted(p["epsilon"] for p in history)
    assert history[-1]["test_accuracy"] == report["training"]["test_accuracy"] > 0.2
    assert (tmp_path / "training.png").read_bytes()[:4] == b"\x89PNG"
    plain = build_model("logistic", in_channels=1, image_size=(28, 28), classes=10)
    plain.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))


def test_json_prints_the_report_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *QUICK, "--output", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "report.json").read_text())


def test_noise_multiplier_instead_of_epsilon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *QUICK, "--noise-multiplier", "4", "--output", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["noise_multiplier"] == 4


def test_without_noise_the_report_says_that_nothing_is_guaranteed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *QUICK, "--noise-multiplier", "0", "--output", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # JSON has no Infinity
    assert report["epsilon"] == "inf"
    assert report["claim"].startswith("NO GUARANTEE")
    assert report["training"]["history"][-1]["epsilon"] == "inf"
    assert main(["report", str(tmp_path)]) == 0
    assert "NO GUARANTEE" in capsys.readouterr().out


def test_an_interrupted_and_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    options = ["--model", "mlp", "--epochs", "6", "--batch-size", "200", "--insecure-seed", "5"]
    options += ["--centred", "--averaging", "0.9", "--lr-schedule", "linear"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["train", *options, "--output", str(whole)]) == 0

    command = [sys.executable, "-m", "dpdl", "train", *options, "--output", str(broken)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (broken / "checkpoint.pt").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 130, messages
    assert "--resume" in messages
    stopped = json.loads((broken / "report.json").read_text())
    assert 0 < stopped["steps"] < stopped["planned_steps"] == 120

    assert main(["train", "--resume", "--output", str(broken)]) == 0
    report = json.loads((broken / "report.json").read_text())
    assert report["steps"] == 120
    assert report["epsilon"] == json.loads((whole / "report.json").read_text())["epsilon"] > stopped["epsilon"]
    expected = torch.load(whole / "model.pt", weights_only=True)
    for name, weights in torch.load(broken / "model.pt", weights_only=True).items():
        assert torch.equal(weights, expected[name]), name


def test_averaging_saves_the_moving_average_of_the_released_weights(tmp_path: Path) -> None:
    def weights_after(epochs: int, averaging: str) -> dict[str, torch.Tensor]:
        output = tmp_path / f"{epochs}-{averaging}"
        options = ["--model", "logistic", "--batch-size", "4000", "--noise-multiplier", "1", "--insecure-seed", "7"]
        options += ["--epochs", str(epochs), "--averaging", averaging, "--output", str(output)]
        assert main(["train", *options]) == 0
        loaded: dict[str, torch.Tensor] = torch.load(output / "model.pt", weights_only=True)
        return loaded

    first, second, average = weights_after(1, "0"), weights_after(2, "0"), weights_after(2, "0.75")
    for name, weight in average.items():
        torch.testing.assert_close(weight, 0.75 * first[name] + 0.25 * second[name])
        assert not torch.equal(weight, second[name])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--resume"], ["no run to resume", "checkpoint.pt"]),
        (["--data", "no-such-folder"], ["no-such-folder", "train-images-idx3-ubyte"]),
        (["--epsilon", "1", "--noise-multiplier", "1"], ["--epsilon", "--noise-multiplier"]),
        (["--epsilon", "-1"], ["epsilon", "-1"]),
        (["--delta", "2"], ["delta", "2"]),
        (["--max-grad-norm", "0"], ["max_grad_norm", "0"]),
        (["--batch-size", "0"], ["batch_size", "0"]),
        (["--epochs", "0"], ["epochs", "0"]),
        (["--momentum", "1"], ["momentum", "1"]),
    ],
)
def test_a_wrong_option_is_one_line_and_writes_nothing(
    options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *options, "--output", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_finished_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *QUICK, "--output", str(tmp_path)]) == 0
    before = (tmp_path / "model.pt").read_bytes()
    assert main(["train", *QUICK, "--output", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "model.pt").read_bytes() == before


def test_resume_takes_no_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *QUICK, "--output", str(tmp_path)]) == 0
    assert main(["train", "--resume", "--epsilon", "8", "--output", str(tmp_path)]) == 2
    assert "--epsilon" in capsys.readouterr().err
