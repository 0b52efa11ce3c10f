"""The guide as it stands: its code runs, its commands take settings and variables that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import torch

from dpdl.federated.flower import DPStrategy
from dpdl.federated.server import FederatedServer
from tests.federated.flower.grid import OneProcess, context
from tests.federated.flower.processes import APP, OFFLINE

GUIDE = Path(__file__).parents[3] / "docs" / "flower.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_the_code_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks("python"):
            exec(compile(block, str(GUIDE), "exec"), names)
        server = FederatedServer(torch.nn.Linear(8, 2), plan=names["plan"])
        nodes = [context(index, 2, ledger=str(tmp_path / f"{index}.ledger")) for index in range(2)]
        strategy = DPStrategy(server, clients=2)
        strategy.start(OneProcess(names["client_side"], nodes), num_rounds=1)
    assert set(strategy.summaries[0].private.outcomes.values()) <= {"accepted"}
    found = {line.split(" ")[0] for line in capsys.readouterr().out.splitlines()}
    assert {"F3", "F5", "F6", "F7", "F8", "F9", "F10", "per-round"} <= found


def test_the_commands_name_settings_that_the_app_has() -> None:
    settings = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    commands = [line for block in blocks("console") for line in block.splitlines()]
    named = [name for line in commands for text in re.findall(r"run-config '(.*?)'$", line) for name in text.split(" ")]
    named += [word for line in commands if "in_process" in line for word in line.split(" ") if "=" in word]
    assert len(named) == 7
    assert {name.split("=")[0] for name in named} <= set(settings)


def test_the_variables_are_those_that_the_tests_run_with() -> None:
    table = dict(re.findall(r"^\| `(\w+)=([^`]*)` \|", GUIDE.read_text(), flags=re.MULTILINE))
    assert {name: table.get(name) for name in OFFLINE} == OFFLINE


def test_each_fault_stands_in_the_table_and_has_a_test() -> None:
    tests = (Path(__file__).parent / "test_defects.py").read_text()
    for number in range(1, 13):
        assert f"\n| F{number} |" in GUIDE.read_text()
        assert f"\ndef test_f{number}_" in tests
