"""Every block of code on every page runs as it stands, or is on a list that says why not."""

from __future__ import annotations

import configparser
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from accountants.commands.one_line_parser import OneLineParser
from tests.docs.blocks import ROOT, Block, blocks_of, page_name, pages
from tests.docs.checks import CHECKS
from tests.docs.exceptions import APART, COMMANDS, GIVEN, NEEDS, NOT_CODE, NOT_RUN, SLOW_PAGES, treatment
from tests.docs.programs import Command, Program, commands_of, kind_of, shows

BLOCKS = {page_name(path): blocks_of(path) for path in pages()}
CODE = ("python", "session", "commands", "output", "data")


def programs() -> dict[str, list[Block]]:
    """What runs together: a page, or a section of those whose sections stand apart."""
    found: dict[str, list[Block]] = {}
    for page, blocks in BLOCKS.items():
        for block in blocks:
            if kind_of(block) in CODE and (page, block.first_line) not in NOT_CODE | NOT_RUN:
                found.setdefault(f"{page}#{block.section}" if page in APART else page, []).append(block)
    return found


def commands() -> Iterator[tuple[str, Command]]:
    for page, blocks in BLOCKS.items():
        for block in blocks:
            if kind_of(block) == "commands":
                for command in commands_of(block):
                    yield page, command


PROGRAMS = programs()
COMMANDS_THERE = list(commands())
EXCEPTED = [(page, command) for page, command in COMMANDS_THERE if treatment(command.line).how != "run"]
SLOW = [
    name
    for name, blocks in PROGRAMS.items()
    if name in SLOW_PAGES
    or any(treatment(c.line).how == "slow" for b in blocks if kind_of(b) == "commands" for c in commands_of(b))
]


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, slow: bool) -> Program:
    """A program's blocks, one after another; without what is too slow or runs elsewhere."""
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    for variable, value in {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "COLUMNS": "120"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("RANK", raising=False)  # as without torchrun
    monkeypatch.chdir(folder)
    if "accelerate" in sys.modules:  # its state is the process's: as in a fresh one
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
    program = Program(folder=folder)
    for block in PROGRAMS[name]:
        if block is PROGRAMS[name][0] and name in GIVEN:
            given = GIVEN[name]
            program.run(Block(page=name, line=0, language="python", text=given, section=""))
        if kind_of(block) != "commands":
            program.run(block)
            continue
        for command in commands_of(block):
            how = treatment(command.line).how
            if how == "run" or (how == "slow" and slow):
                program.command(command, block)
    return program


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in SLOW_PAGES])
def test_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = run(name, tmp_path, monkeypatch, slow=False)
    if name in CHECKS:
        CHECKS[name](program)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_page_runs_with_what_is_slow(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = run(name, tmp_path, monkeypatch, slow=True)
    if name in CHECKS:
        CHECKS[name](program)


# ── what is not run ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_is_of_a_known_kind_or_listed(page: str) -> None:
    listed = NOT_CODE | NOT_RUN
    unknown = [b for b in BLOCKS[page] if kind_of(b) == "unknown" and (page, b.first_line) not in listed]
    assert not unknown, [f"{b.place} in {b.language!r}: {b.first_line}" for b in unknown]


def test_every_exception_is_of_something_that_is_there() -> None:
    there = {(page, block.first_line) for page, blocks in BLOCKS.items() for block in blocks}
    assert not (NOT_CODE | NOT_RUN).keys() - there
    assert NEEDS.keys() | GIVEN.keys() | SLOW_PAGES.keys() | CHECKS.keys() <= PROGRAMS.keys()
    assert BLOCKS.keys() >= APART
    used = {treatment(command.line).command for _, command in COMMANDS_THERE}
    assert not {rule.command for rule in COMMANDS} - used
    for rule in COMMANDS:
        assert rule.by is None or (ROOT / rule.by).exists(), rule.by


def test_code_that_is_not_run_is_python_at_least() -> None:
    for page, blocks in BLOCKS.items():
        for block in blocks:
            if (page, block.first_line) in NOT_RUN:
                compile("\n" * block.line + block.text, page, "exec", dont_inherit=True)


class Parsed(Exception):
    """Raised in place of running a command whose arguments are right."""


@pytest.fixture
def only_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    original = OneLineParser.parse_args

    def parse(self: OneLineParser, *arguments: object) -> None:
        original(self, *arguments)  # type: ignore[call-overload]
        raise Parsed

    monkeypatch.setattr(OneLineParser, "parse_args", parse)


@pytest.mark.usefixtures("only_parsing")
@pytest.mark.parametrize(("page", "command"), EXCEPTED, ids=[f"{page}: {c.line[:50]}" for page, c in EXCEPTED])
def test_a_command_that_is_not_run_is_right_as_far_as_can_be_seen(
    page: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = treatment(command.line)
    if rule.how in ("parsed", "slow"):
        by_itself = Command(
            line=re.sub(r"\s>\s*\S+$", "", command.line), shown=""
        )  # where its output goes is the shell's
        with pytest.raises(Parsed):
            by_itself.main(by_itself.own or [])
    elif rule.how == "synopsis":
        for words in alternatives(command):
            assert Command(line=" ".join(words), shown="").main([*words[words.index("--") + 1 :], "--help"]) == 0
    elif rule.how == "options":
        module = command.words[command.words.index("-m") + 1]
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        for option in re.findall(r"--(?:no-)?([\w-]+)", command.line):
            assert f'"--{option}"' in source or f'"--no-{option}"' in source, option
    elif rule.how == "target":
        assert re.search(rf"^{command.words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif rule.how == "extras":
        assert extras_of(command) <= extras_there()
    else:
        assert rule.how == "elsewhere"
        assert rule.by is not None


def alternatives(command: Command) -> Iterator[list[str]]:
    """The commands that a synopsis names, each as its start, "--" and the command's path: `dpdl split a | b` is two."""
    words = [word for word in command.words if word != "..."]
    start = 3 if words[0] == "python" else 1
    path: list[str] = []
    names = [[]]  # type: list[list[str]]
    for word in words[start:]:
        if word == "|":
            names.append([])
        else:
            names[-1].append(word)
    path = names[0][:-1]
    for name in [names[0][-1:], *names[1:]]:
        yield [*words[:start], "--", *path, *name]


def extras_of(command: Command) -> set[str]:
    return {extra for listed in re.findall(r"\[([\w,]+)\]", command.line) for extra in listed.split(",")}


def extras_there() -> set[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return set(config["options.extras_require"])


# ── the tests themselves ────────────────────────────────────────────────────────────────────────────


def block(text: str, language: str = "python") -> Block:
    return Block(page="page.md", line=0, language=language, text=text, section="")


@pytest.mark.parametrize(
    ("shown", "printed", "whole", "right"),
    [
        ("epsilon <= 3.00 ...", "epsilon <= 3.00 at delta = 1e-05\n", True, True),
        ("epsilon <= 2.99 ...", "epsilon <= 3.00 at delta = 1e-05\n", True, False),
        ("at delta", "epsilon <= 3.00 at delta = 1e-05\n", False, True),
        ("at delta", "epsilon <= 3.00 at delta = 1e-05\n", True, False),
        ("accuracy 84%", "accuracy 91%", True, True),
        ("accuracy 84% in 3 s", "accuracy 91.5% in 12.25 s", True, True),
        ("accuracy 0.84", "accuracy 0.91", True, False),
        ("a line that\nis wrapped", "a line that is wrapped", True, True),
    ],
)
def test_shown_output_is_compared(shown: str, printed: str, whole: bool, right: bool) -> None:
    assert shows(shown, printed, whole=whole) is right


def test_wrong_blocks_fail(tmp_path: Path) -> None:
    program = Program(folder=tmp_path)
    program.run(block("print('seen', 1)"))
    program.run(block("seen 1", "text"))
    with pytest.raises(AssertionError, match="but this was printed"):
        program.run(block("seen 1", "text"))  # nothing was printed since
    with pytest.raises(AssertionError, match="Expected"):
        program.run(block(">>> 1 + 1\n3\n"))
    with pytest.raises(NameError):
        program.run(block("nowhere"))
    with pytest.raises(AssertionError, match="ended with 3"):
        program.run(block("$ exit 3", "console"))
    with pytest.raises(AssertionError, match="printed\nb"):
        program.run(block("$ echo b\na", "console"))
    with pytest.raises(AssertionError, match="ended with 2"):
        program.run(block("$ dpdl epsilon --no-such-option", "console"))
    assert kind_of(block("x = 1", "rust")) == "unknown"
    assert kind_of(block("x = 1", "")) == "unknown"


def test_blocks_are_found_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.docs.blocks.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A\n\n    make test\n\n- item\n  ~~~py\n  x = 1\n  ~~~\n\n## B\n\n````bash\nls\n````\n")
    found = [(b.line, b.language, b.first_line, b.section) for b in blocks_of(page)]
    assert found == [(2, "(indented)", "make test", ""), (6, "py", "x = 1", ""), (12, "bash", "ls", "B")]
