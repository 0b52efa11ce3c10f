"""`dpdl audit`: what it prints, its exit codes, and that it refutes what is wrong and nothing else."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.audit_faults import CORRECT, NO_CLIP, planted
from dpdl.audit import command, saved_run
from dpdl.data import ImageData
from dpdl.errors import CheckpointError, ParameterError
from dpdl.training import WEIGHTS, Settings, train

TRAIN, TEST = 100, 100


def noise_images() -> ImageData:
    """Labels that nothing in the images tells."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(TRAIN + TEST, 1, 12, 12, generator=generator)
    labels = torch.randint(10, (TRAIN + TEST,), generator=generator)
    return ImageData(
        train_images=images[:TRAIN],
        train_labels=labels[:TRAIN],
        test_images=images[TRAIN:],
        test_labels=labels[TRAIN:],
        classes=tuple("0123456789"),
        name="noise",
        source="memory",
    )


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    settings = Settings(model="logistic", epochs=2, batch_size=25, epsilon=1.0, delta=1e-3, averaging=0.5)
    train(settings, noise_images(), output=directory, data_path="where it was")
    return directory


@pytest.fixture(autouse=True)
def _data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def load(path: Any) -> ImageData:
        assert path == "where it was"
        return noise_images()

    monkeypatch.setattr(saved_run, "load", load)
    with torch.random.fork_rng(devices=[]):
        yield


def audit(*words: object) -> int:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    arguments = parser.parse_args(["audit", *map(str, words)])
    code: int = arguments.run(arguments)
    return code


def learned_by_heart(directory: Path) -> None:
    """Replace the saved weights by others, trained on the same images without privacy."""
    again = saved_run.read_run(directory).train_again
    model, data = again.new_model(), noise_images()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_images), data.train_labels).backward()
        optimizer.step()
    torch.save(model.state_dict(), directory / WEIGHTS)


def test_the_saved_model_is_attacked_and_no_epsilon_given_where_nobody_split_at_random(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(run_directory) == 0
    out = capsys.readouterr().out
    assert "at a false positive rate of 0.001" in out
    assert "the claim allows" in out
    assert "No bound on epsilon" in out
    assert "epsilon >=" not in out


def test_json_is_all_that_stdout_gets(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(run_directory, "--json", "--split", "random", "--confidence", 0.999) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "dpdl.audit-run/1"
    assert found["membership"]["members"] == TRAIN
    # The claim is about replacing an example, which is more than the run's own: that is about adding or removing one.
    assert found["audit"]["claimed_epsilon"] > 1.3
    assert found["audit"]["relation"] == "replace_one"
    assert found["consistent"] is True


def test_weights_that_do_not_fit_their_claim_are_found_out(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    for file in run_directory.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    learned_by_heart(directory)
    assert audit(directory, "--split", "random") == command.EXIT_CONTRADICTED
    assert "the claim is contradicted" in capsys.readouterr().out
    assert audit(directory) == 0  # and nothing is said where nothing is known of the split


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "damage",
    [
        "5",
        "[]",
        DEEP,
        '"sample_rate"',
        {"delta": 7},
        {"delta": "x"},
        {"delta": None},
        {"steps": 0},
        {"steps": 10**400},
        {"steps": "8"},
        {"noise_multiplier": "abc"},
        {"noise_multiplier": None},
        {"sample_rate": None},
        {"expected_batch_size": 10**400},
        {"max_grad_norm": []},
    ],
    ids=str,
)
def test_a_damaged_report_is_refused_in_one_line(run_directory: Path, tmp_path: Path, damage: Any) -> None:
    directory = tmp_path / "run"
    shutil.copytree(run_directory, directory)
    report = directory / "report.json"
    report.write_text(damage if isinstance(damage, str) else json.dumps({**json.loads(report.read_text()), **damage}))
    with pytest.raises(CheckpointError, match=r"report\.json") as refusal:
        audit(directory)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("weights", [{"other": torch.zeros(3)}, [torch.zeros(3)], {}, 5])
def test_weights_of_another_network_are_refused(run_directory: Path, tmp_path: Path, weights: Any) -> None:
    directory = tmp_path / "run"
    shutil.copytree(run_directory, directory)
    torch.save(weights, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match="is not of the network"):
        audit(directory)


@pytest.mark.parametrize(("fault", "code"), [(CORRECT, 0), (NO_CLIP, command.EXIT_CONTRADICTED)])
def test_canaries_in_the_training_done_again_tell_a_fault(
    run_directory: Path, fault: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with planted(fault):
        assert audit(run_directory, "--method", "one-run", "--canaries", 1000, "--confidence", 0.999) == code
    out = capsys.readouterr().out
    assert "one run, white box" in out
    assert "Assumptions: the coins were fair" in out


def test_shadow_models_are_trained_as_the_run_was_and_plotted(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "roc.png"
    assert audit(run_directory, "--method", "lira", "--models", 4, "--plot", plot, "--confidence", 0.999) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "4 shadow models" in capsys.readouterr().out


@pytest.mark.slow
def test_many_runs_with_and_without_one_image_survive_their_claim(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(run_directory, "--method", "many-runs", "--runs", 20, "--confidence", 0.999) == 0
    assert "many runs" in capsys.readouterr().out


def test_what_is_no_run_is_refused_by_name(run_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Make one: dpdl train --output"):
        audit(tmp_path / "nothing")
    with pytest.raises(ParameterError, match="one-run has none"):
        audit(run_directory, "--method", "one-run", "--plot", "roc.png")
    with pytest.raises(ParameterError, match="--confidence"):
        audit(run_directory, "--confidence", "1.5")


def test_a_run_done_again_is_the_mechanism_that_was_saved(run_directory: Path) -> None:
    saved = saved_run.read_run(run_directory)
    assert saved.plan.sample_rate == 0.25
    assert saved.plan.steps == 8
    assert saved.epsilon(saved_run.NeighboringRelation.ADD_OR_REMOVE) <= 1.0
    images, labels = saved.members
    fewer = saved.train_again(images[:60], labels[:60], 0)
    with torch.no_grad():
        assert fewer(images[:3]).shape == (3, 10)
