"""What all commands have in common: help with examples, JSON, exit codes, errors in one line, completion."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dpdl import cli, completion_command
from dpdl.errors import DataError, ParameterError

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
    assert names >= {"train", "report", "audit", "sweep", "federated", "split serve", "split join", "epsilon", "explain"}


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
        (KeyboardInterrupt(), 130, "dpdl: stopped\n"),
    ],
)
def test_an_error_is_one_line_on_stderr(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "parser", lambda: raising(error))
    assert cli.main([]) == code
    assert capsys.readouterr() == ("", text)


def test_a_defect_is_not_taken_for_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "parser", lambda: raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main([])


def test_a_shell_completes_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
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
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert {"train", "report", "audit", "sweep"} <= completed("")
    assert completed("aud") == {"audit"}
    assert "--max-grad-norm" in completed("train", "--max")
    assert completed("completion", "z") == {"zsh"}


def test_completion_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(DataError, match=r"dpdl\[completion\]"):
        completion_command.run("bash", cli.parser())
