"""The guide to accounting, as it stands: its Python examples give what they show, its commands print what they show."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest

import accountants
from accountants import cli

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "accounting.md"
OWN_PROGRAM = "python -m accountants "


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """(line number, text) of each fenced block in a language."""
    text = path.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in found]


def examples(path: Path) -> list[tuple[int, str]]:
    """The Python blocks that show what they give."""
    return [(line, text) for line, text in blocks(path, "python") if text.startswith(">>> ")]


def commands() -> list[tuple[str, str]]:
    """(arguments, what is printed) of each command in the guide."""
    shown = "".join(text for _, text in blocks(GUIDE, "console"))
    pairs = [part.split("\n", 1) for part in shown.split("$ ")[1:]]
    return [(line.removeprefix(OWN_PROGRAM), output) for line, output in pairs]


def failures(text: str, names: dict[str, object], path: Path, line: int) -> str:
    """What an example got wrong, as doctest reports it; leaves in `names` what it defined."""
    test = doctest.DocTestParser().get_doctest(text, names, path.name, str(path), line)
    reports: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=reports.append, clear_globs=False)
    names.update(test.globs)
    return "".join(reports)


@pytest.mark.parametrize("path", [GUIDE, ROOT / "README.md"], ids=lambda path: path.name)
def test_the_python_examples_give_what_they_show(path: Path) -> None:
    names: dict[str, object] = {}
    found = examples(path)
    assert found, f"{path.name} has no example"
    for line, text in found:  # each may use the names of those before
        assert failures(text, names, path, line) == ""


def test_an_example_that_shows_something_else_is_found() -> None:
    assert "Expected:" in failures(">>> 1 + 1\n3\n", {}, GUIDE, 1)


@pytest.mark.parametrize(("line", "output"), commands(), ids=lambda text: text.split("\n")[0][:40])
def test_the_commands_print_what_they_show(line: str, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(shlex.split(line)) == 0
    assert capsys.readouterr().out == output


def test_the_guide_covers_every_event() -> None:
    events = {name for name in accountants.__all__ if isinstance(getattr(accountants, name), type)}
    kinds = {name for name in events if issubclass(getattr(accountants, name), accountants.Event)}
    guide = GUIDE.read_text()
    missing = {name for name in kinds - {"Event", "Composed", "Repeated"} if f"`{name}" not in guide}
    assert not missing
