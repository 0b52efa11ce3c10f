"""A page's blocks as a program: run in one namespace and one folder, their output held to what the page shows.

Python runs in this process, for speed: importing torch takes longer than most pages. So does `dpdl`; other commands run
in a shell. A block of `text` shows what the code since the last such block printed, a block of `console` what each
command prints. "..." stands for anything. Shares, accuracies and times vary with secure noise, so numbers before "%" or
a unit of time count as the same; all other words and numbers are held to.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import accountants.cli
import dpdl.cli
from tests.docs.blocks import INDENTED, Block

__all__ = ["Command", "Program", "commands_of", "kind_of", "shows"]

PYTHON = ("python", "py", "python3")
SESSION = ("pycon", "doctest")
SHELL = ("console", "bash", "sh", "shell")
DATA = {"toml": tomllib.loads, "json": json.loads}
SITE = re.compile(r"\{[\w-]+\}.*")  # a directive of the site, such as {toctree}
DRAWN = re.compile(r"[─│├└▼▲▶◀]")
ARROWS = re.compile(r"[▼▲▶◀]")
FIRST_WORDS = ("dpdl", "python", "make", "pip", "torchrun", "flwr", "git", "cd", "ls", "cat")
SHELL_SIGNS = re.compile(r"[|<>&;$`*]")
MEASURED = r"\d[\d,]*(?:\.\d+)?"  # a number that varies, before one of these
UNITS = r"(?=\s?%|\s?(?:ms|s|min|seconds|minutes)\b)"
SECONDS = 900


def kind_of(block: Block) -> str:
    """ "python", "session", "commands", "output", "data", "drawing", "site", or "unknown"."""
    language = block.language.split(" ")[0]
    if language in PYTHON:
        return "session" if block.text.lstrip().startswith(">>> ") else "python"
    if language in SESSION:
        return "session"
    if language in SHELL or (language == INDENTED and block.text.split(maxsplit=1)[0] in FIRST_WORDS):
        return "commands"
    if language == "text":
        return "drawing" if ARROWS.search(block.text) else "output"
    if language in DATA:
        return "data"
    if SITE.fullmatch(block.language):
        return "site"
    return "drawing" if language == "" and DRAWN.search(block.text) else "unknown"


# ── commands ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of a block, and what the page says that it prints ("" if it does not say)."""

    line: str
    shown: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)

    @property
    def own(self) -> list[str] | None:
        """The arguments, if it is this project's command and needs no shell."""
        if SHELL_SIGNS.search(re.sub(r"'[^']*'|\"[^\"]*\"|\s#.*$", "", self.line)):
            return None
        words = self.words
        for start in (["dpdl"], ["python", "-m", "dpdl"], ["python", "-m", "accountants"]):
            if words[: len(start)] == start:
                return words[len(start) :]
        return None

    def main(self, arguments: Sequence[str]) -> int:
        """Run it in this process; its exit code."""
        entry = accountants.cli.main if self.words[2:3] == ["accountants"] else dpdl.cli.main
        try:
            return entry(list(arguments))
        except SystemExit as stop:  # of --help and of argparse
            return int(stop.code or 0)


def commands_of(block: Block) -> Iterator[Command]:
    """Lines after "$ ", each with the lines under it; without any "$ ", every line is a command.

    What stands to the right of an indented command, after two spaces, is a remark.
    """
    text = re.sub(r"\\\n\s*", " ", block.text)
    if not re.search(r"^\$ ", text, flags=re.MULTILINE):
        for line in text.splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                bare = re.split(r"\s{2,}", line.strip())[0] if block.language == INDENTED else line.strip()
                yield Command(line=bare, shown="")
        return
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        yield Command(line=line.strip(), shown=shown.strip("\n"))


# ── output ──────────────────────────────────────────────────────────────────────────────────────────


def shows(shown: str, printed: str, *, whole: bool) -> bool:
    """Whether what the page shows was printed: all of it, or somewhere in it."""
    pattern = r"\s+".join(_pattern(word) for word in re.sub(rf"{MEASURED}{UNITS}", "\0", shown).split())
    found = re.fullmatch(rf"\s*{pattern}\s*", printed, re.DOTALL) if whole else re.search(pattern, printed, re.DOTALL)
    return found is not None


def _pattern(word: str) -> str:
    return re.escape(word).replace(re.escape("..."), ".*?").replace(re.escape("\0"), MEASURED)


# ── programs ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(kw_only=True)
class Program:
    """A running page.

    Attributes:
        folder: where it runs.
        names: what its Python has defined so far.
        printed: all that it printed.
    """

    folder: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    printed: str = ""
    _unshown: str = ""

    def run(self, block: Block) -> None:
        """Run a block, or hold it to what was printed."""
        kind = kind_of(block)
        if kind == "python":
            self._execute(block.text, block)
        elif kind == "session":
            self._session(block)
        elif kind == "data":
            DATA[block.language](block.text)
        elif kind == "output":
            assert shows(block.text, self._unshown, whole=False), (
                f"{block.place} shows\n{block.text}\nbut this was printed:\n{self._unshown}"
            )
            self._unshown = ""
        elif kind == "commands":
            for command in commands_of(block):
                self.command(command, block)
        else:
            assert kind in ("drawing", "site"), f"{block.place}: {kind}"

    def _execute(self, text: str, block: Block) -> None:
        code = compile("\n" * block.line + text, block.page, "exec", dont_inherit=True)  # errors show the page's lines
        with self._listening(), torch.random.fork_rng(devices=[]):
            exec(code, self.names)

    def _session(self, block: Block) -> None:
        test = doctest.DocTestParser().get_doctest(block.text, self.names, block.page, block.page, block.line)
        reports: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        runner.run(test, out=reports.append, clear_globs=False)
        self.names.update(test.globs)
        assert not reports, "".join(reports)

    def command(self, command: Command, block: Block) -> None:
        """Run a command of this project, or of the shell."""
        before = len(self.printed)
        arguments = command.own
        if arguments is not None:
            with self._listening():
                code, said = command.main(arguments), ""
        else:
            code, said = self._shell(command.line)
            self._heard(said)
        assert code == 0, f"{block.place}: {command.line} ended with {code}\n{said or self.printed[before:]}"
        if command.shown:
            printed = self.printed[before:]
            assert shows(command.shown, printed, whole=True), f"{block.place}: {command.line} printed\n{printed}"

    def _shell(self, line: str) -> tuple[int, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        heard = io.StringIO()
        try:
            with contextlib.redirect_stdout(heard):
                yield
        finally:
            self._heard(heard.getvalue())

    def _heard(self, text: str) -> None:
        self.printed += text
        self._unshown += text
