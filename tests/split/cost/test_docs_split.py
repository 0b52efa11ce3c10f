"""The guide's and the tutorial's code runs as it stands, block after block; their commands exist as they are given."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from accountants.commands.one_line_parser import OneLineParser
from dpdl.split.commands import cost_command, group

DOCS = Path(__file__).parents[3] / "docs"
GUIDE, TUTORIAL = "split.md", "tutorials/split.md"


def run_blocks(guide: str) -> dict[str, Any]:
    """All Python blocks of a guide, in one namespace."""
    text = (DOCS / guide).read_text()
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        for match in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
            before = "\n" * text[: match.start(1)].count("\n")  # so that errors show the guide's lines
            exec(compile(before + match.group(1), guide, "exec"), names)
    return names


def commands(guide: str) -> Iterator[list[str]]:
    for line in re.findall(r"^\$ (dpdl .*)$", (DOCS / guide).read_text(), flags=re.MULTILINE):
        yield shlex.split(line)


def test_the_guides_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'dpdl[split]'")
    monkeypatch.chdir(tmp_path)
    names = run_blocks(GUIDE)
    assert names["clinic"].steps_taken == 5
    said = capsys.readouterr().out
    assert "against server, record: NO GUARANTEE (activations are sent as they are; labels are sent in clear)" in said
    assert "against model consumers, record: epsilon <= 2.96 at delta = 1e-05" in said
    assert "against server, record: epsilon <= 8.09 at delta = 1e-05, replacing one record" in said
    assert "noise_multiplier: 1.2 here, 0.1 there" in said
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_the_tutorials_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlxtend", reason="mlxtend is not installed: pip install 'dpdl[demo]'")
    monkeypatch.chdir(tmp_path)
    names = run_blocks(TUTORIAL)
    said = capsys.readouterr().out
    assert "epsilon <= 2.89 at delta = 1e-05" in said
    for epsilon in ("24.39", "10.00", "4.38"):
        assert f"epsilon {epsilon}" in said
    shares = [int(share) for share in re.findall(r"(\d+)%", said)]
    assert shares[0] > 75
    assert shares[1] > 80  # noise 0.5
    assert shares[3] < shares[2] < shares[1]
    assert shares[4] < shares[5]  # one modality, two
    assert names["run"].steps_taken == 100


@pytest.mark.parametrize("guide", [GUIDE, TUTORIAL])
def test_the_commands_exist_as_they_are_given(guide: str) -> None:
    found = list(commands(guide))
    assert found
    for words in found:
        assert words[:2] == ["dpdl", "split"]
        parser = OneLineParser(prog="dpdl")
        subparsers = parser.add_subparsers(required=True)
        if words[2] == "cost":
            cost_command.register(subparsers)
            assert parser.parse_args(words[2:]).run is cost_command.run
        else:
            group.register(subparsers)
            assert callable(parser.parse_args(words[1:]).run)


def test_links_lead_somewhere() -> None:
    for guide in (GUIDE, TUTORIAL):
        for target in re.findall(r"\]\(([\w./]+\.md)[^)]*\)", (DOCS / guide).read_text()):
            assert ((DOCS / guide).parent / target).exists(), target
