"""What all commands have in common: help with examples, JSON, exit codes, errors in one line, completion."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from accountants import cli as accountants_cli
from dpdl import cli, completion_command, train_command
from dpdl.audit.saved_run import read_run
from dpdl.errors import CheckpointError, DataError, ParameterError

WITHOUT_JSON = {
    "dpdl completion": "prints a script",
}


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of commands that do something."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield parser
    for action in below:
        for inner in action.choices.values():
            yield from leaves(inner)


COMMANDS = {command.prog: command for command in leaves(cli.parser())}


def test_all_commands_are_there() -> None:
    names = {name.removeprefix("dpdl ") for name in COMMANDS}
    assert names >= {
        "train",
        "report",
        "audit",
        "sweep",
        "federated",
        "split serve",
        "split join",
        "epsilon",
        "explain",
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_it_does_and_has_an_example(name: str) -> None:
    command = COMMANDS[name]
    text = command.format_help()
    assert command.description
    assert "example" in text
    assert f"{name} " in text.split("example", 1)[1], "an example is a command line of this command"
    for action in command._actions:
        assert action.help, (name, action.dest, "every option says what it is")


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - WITHOUT_JSON))
def test_results_come_as_json_too(name: str) -> None:
    assert "--json" in COMMANDS[name]._option_string_actions


@pytest.mark.parametrize(
    "argv",
    [
        ["no-such-command"],
        ["train", "--epsilon", "much"],
        ["train", "--no-such-option"],
        ["epsilon", "--noise-multiplier", "1"],
        ["completion", "no-such-shell"],
        [],
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    found = capsys.readouterr()
    assert left.value.code == 2
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert found.err.startswith("dpdl")


def raising(error: BaseException) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()

    def run(_: argparse.Namespace) -> int:
        raise error

    parser.set_defaults(run=run)
    return parser


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ParameterError("delta must be in (0, 1)."), 2, "dpdl: error: delta must be in (0, 1).\n"),
        (DataError("x is missing. Looked for:\n  MNIST: four files\n  a tar"), 2,
         "dpdl: error: x is missing. Looked for: MNIST: four files a tar\n"),
        (PermissionError(13, "Permission denied", "/locked/run"), 2,
         "dpdl: error: /locked/run: Permission denied. Check that the place exists, may be used, and has room.\n"),
        (OSError(28, "No space left on device"), 2,
         "dpdl: error: No space left on device. Check that the place exists, may be used, and has room.\n"),
        (BrokenPipeError(32, "Broken pipe"), 2,  # of a worker, say: stdout is whole
         "dpdl: error: Broken pipe. Check that the place exists, may be used, and has room.\n"),
        (OSError("cannot identify image file"), 2, "dpdl: error: cannot identify image file.\n"),
        (TimeoutError(), 2, "dpdl: error: TimeoutError.\n"),
        (KeyboardInterrupt(), 130, "dpdl: stopped\n"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_on_stderr(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "parser", lambda: raising(error))
    assert cli.main([]) == code
    assert capsys.readouterr() == ("", text)


PLAN = ["--noise-multiplier", "2", "--sample-rate", "1", "--steps", "1", "--delta", "1e-5"]


def unread() -> io.TextIOWrapper:
    """A pipe whose reader has left, as `head` does."""
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


@pytest.mark.parametrize("argv", [["epsilon", *PLAN], ["--help"], ["epsilon", "--help"]])
def test_a_reader_who_leaves_ends_the_command_quietly(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with unread() as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(argv) == 141
        assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("argv", [["epsilon", *PLAN], ["--help"]])
def test_a_full_disk_under_stdout_is_said(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(argv) == 2
        found = capsys.readouterr().err
    assert found.startswith("dpdl: error: standard output: No space left on device.")
    assert found.count("\n") == 1


def test_closed_streams_do_not_end_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # what the interpreter makes of `>&-`
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["epsilon", *PLAN]) == 0
    assert cli.main(["report", "no-such-run"]) == 2


def test_names_that_are_no_text_are_printed_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    parser = argparse.ArgumentParser()
    parser.set_defaults(run=lambda _: print("± \udcff") or 0)
    monkeypatch.setattr(cli, "parser", lambda: parser)
    assert cli.main([]) == 0
    assert raw.getvalue() == b"\\xb1 \\udcff\n"


SAME_EVERYWHERE: dict[str, dict[str, Any]] = {
    "--json": {"nargs": 0},
    "--resume": {"nargs": 0},
    "--output": {"metavar": "DIR", "type": Path},
    "--plot": {"metavar": "FILE", "type": Path, "default": None},
    "--html": {"metavar": "PAGE", "type": Path, "default": None},
    "--data": {"metavar": "PATH", "type": None, "default": None},
    "--insecure-seed": {"metavar": "SEED", "type": int, "default": None},
    "--max-physical-batch-size": {"metavar": "N", "type": int, "default": None},
    "--delta": {"type": float},
    "--noise-multiplier": {"type": float},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_means_the_same_in_every_command(name: str) -> None:
    for flag, facts in SAME_EVERYWHERE.items():
        action = COMMANDS[name]._option_string_actions.get(flag)
        if action is not None:
            assert {fact: getattr(action, fact) for fact in facts} == facts, flag


DRAWING = {
    "dpdl curve": PLAN,
    "dpdl explain": PLAN,
    "dpdl audit": ["no-such-run"],
    "dpdl federated": ["--data", "no-such-data"],
    "dpdl split cost": ["--model", "no-such-model"],
}


def test_all_commands_that_draw_are_tried() -> None:
    assert {name for name, command in COMMANDS.items() if "--plot" in command._option_string_actions} == set(DRAWING)


@pytest.mark.parametrize("name", DRAWING)
def test_a_plot_that_cannot_be_drawn_is_refused_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [*name.split()[1:], *DRAWING[name], "--plot"]
    found = importlib.util.find_spec

    def says(file: str, what: str) -> None:
        assert cli.main([*argv, file]) == 2
        assert what in capsys.readouterr().err

    (tmp_path / "file").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: module)  # as with matplotlib
    says("plot.xyz", "names no format")
    says("nowhere/plot.png", "cannot be written")
    says("file/plot.png", "cannot be written")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "matplotlib" else found(n))
    says("plot.png", "dpdl[plots]")


@pytest.mark.parametrize("name", ["epsilon", "curve"])
def test_answers_say_their_schema(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert accountants_cli.main([name, *PLAN, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == f"accountants.{name}/1"


@pytest.mark.parametrize("device", ["nosuch", "meta", "cuda:999"])
def test_a_device_that_is_not_there_is_refused_before_any_work(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--device", device, "--data", "no-such-data", "--output", str(tmp_path / "run")]
    assert cli.main(argv) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"dpdl: error: --device {device!r} cannot be used")
    assert found.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ── a folder that is no run ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("content", [b"not a checkpoint", b"", b"\x80\x02}."])
def test_a_damaged_checkpoint_is_refused_in_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    for command in ("train", "federated"):
        assert cli.main([command, "--resume", "--output", str(tmp_path)]) == 2
        found = capsys.readouterr()
        assert found.out == ""
        assert found.err.startswith("dpdl: error: ")
        assert found.err.count("\n") == 1


@pytest.mark.parametrize("report", [b"\xff\xfe", b"{}", b'{"claim":'])
def test_an_audit_refuses_what_is_no_run(report: bytes, tmp_path: Path) -> None:
    for name in ("checkpoint.pt", "model.pt"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
    (tmp_path / "report.json").write_bytes(report)
    with pytest.raises(CheckpointError):
        read_run(tmp_path)


def test_an_audit_refuses_a_damaged_checkpoint(tmp_path: Path) -> None:
    needed = ("sample_rate", "expected_batch_size", "steps", "noise_multiplier", "max_grad_norm", "delta")
    for name in ("checkpoint.pt", "model.pt"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
    (tmp_path / "report.json").write_text(json.dumps(dict.fromkeys(needed, 1)))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_run(tmp_path)


# ── stopping ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("saved", "says"), [(True, "Go on with: dpdl train --resume --output '{}'"), (False, "Nothing is saved yet")]
)
def test_a_second_ctrl_c_says_how_to_go_on(
    saved: bool, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a long name [/red] that a terminal would break and a markup language would refuse"
    output.mkdir(parents=True)

    def stopped(*_: object, **__: object) -> None:
        if saved:
            (output / "checkpoint.pt").touch()
        raise KeyboardInterrupt

    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(train_command, "load", lambda _: SimpleNamespace(name="[/data]"))
    monkeypatch.setattr(train_command, "train", stopped)
    assert cli.main(["train", "--output", str(output)]) == 130
    assert says.format(output) in capsys.readouterr().err


def test_a_defect_is_not_taken_for_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "parser", lambda: raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main([])


def test_a_shell_completes_commands_options_and_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    asked = """
COMP_WORDS=(dpdl {words}); COMP_CWORD={last}; COMP_LINE="dpdl"; COMP_POINT=4
_shtab_dpdl
printf '%s\\n' "${{COMPREPLY[@]}}"
"""

    def completed(*words: str) -> set[str]:
        program = script + asked.format(words=" ".join(f"'{word}'" for word in words), last=len(words))
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
        return set(done.stdout.split())

    assert {"train", "report", "audit", "sweep"} <= completed("")
    assert completed("aud") == {"audit"}
    assert "--max-grad-norm" in completed("train", "--max")
    assert completed("completion", "z") == {"zsh"}
    (tmp_path / "run of today").mkdir()
    (tmp_path / "run.json").touch()
    assert completed("report", "run.j") == {"run.json"}
    assert completed("train", "--data", "run.j") == {"run.json"}
    assert completed("train", "--output", "run.j") == set()
    assert completed("train", "--output", "run") == {"run", "of", "today"}, "split() above; one folder"


def test_completion_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(DataError, match=r"dpdl\[completion\]"):
        completion_command.run("bash", cli.parser())
