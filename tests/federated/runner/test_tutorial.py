"""The tutorial, as it stands: its code runs, and what it says of the outcome is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from accountants.commands.one_line_parser import OneLineParser
from dpdl.federated.command import register, settings_given
from dpdl.federated.image_federation import FederationSettings

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")

TUTORIAL = Path(__file__).parents[3] / "docs" / "tutorials" / "federated.md"


def test_the_code_runs_and_the_text_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = TUTORIAL.read_text()
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        for match in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
            before = "\n" * text[: match.start(1)].count("\n")  # so that errors show the tutorial's lines
            exec(compile(before + match.group(1), str(TUTORIAL), "exec"), names)
    said = capsys.readouterr().out

    assert re.search(r"against server, record: NO GUARANTEE .*its updates are sent without clipping or noise", said)
    plain, private = (names[run].history.last_evaluation["accuracy"] for run in ("plain", "private"))
    assert names["run"].history.last_evaluation["accuracy"] > 0.8
    assert plain > 0.8
    assert plain > private > 0.25  # secure noise: 0.44 was seen; a guess is right once in ten times

    history = names["private"].history
    epsilons = history.rounds[-1].client_epsilon
    assert all(epsilon <= names["budgets"][name] for name, epsilon in epsilons.items())
    assert history.refusals["budget"] >= 1
    assert all("island" in record.refused["budget"] for record in history.rounds if record.refused)
    sizes = dict(zip(names["names"], map(len, names["parts"]), strict=True))
    first = history.rounds[0].client_epsilon  # nobody has refused yet
    assert max(first, key=first.get) == min(sizes, key=sizes.get)

    assert names["of_clients"].history.last_evaluation["accuracy"] < 0.35
    phones = names["of_phones"]
    assert phones.history.last_evaluation["accuracy"] > 0.65
    assert phones.history.secret_participation
    assert 7.9 < phones.history.rounds[-1].server_epsilon <= 8.0
    for plot in ("hospitals.png", "phones.png"):
        assert (tmp_path / plot).read_bytes()[:4] == b"\x89PNG"


def test_the_commands_that_it_shows_are_understood() -> None:
    commands = re.findall(r"^    dpdl (federated [^#\n]*)", TUTORIAL.read_text(), flags=re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        parser = OneLineParser(prog="dpdl")
        register(parser.add_subparsers())
        FederationSettings(**settings_given(parser.parse_args(command.split())))
