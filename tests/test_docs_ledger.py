"""The guide to the ledger, as it stands: its code runs and says what it says it does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from accountants import Gaussian, PoissonSampled
from dpdl import errors
from dpdl.budget import Budget
from dpdl.ledger_file import LedgerFile

GUIDE = Path(__file__).parents[1] / "docs" / "ledger.md"


def blocks() -> list[str]:
    """Each fenced block, after as many empty lines as stand before it, so that errors show its lines."""
    text = GUIDE.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return ["\n" * text[: match.start(1)].count("\n") + match.group(1) for match in found]


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One after another: each uses the names of those before."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks():
            exec(compile(block, str(GUIDE), "exec"), names)
    said = capsys.readouterr().out
    patients = LedgerFile("patients.ledger")
    assert [(entry.label, entry.count) for entry in patients.entries] == [("mean of the ages", 1), ("step", 30)]
    assert patients.budget == Budget(epsilon=3.0, delta=1e-5)
    assert "is weaker" in said
    assert "of a budget of 1; no further step fits" in said
    assert "The budget is spent" in said
    assert LedgerFile("hospital.ledger").epsilon(1e-5) <= 1.0
    assert said.strip().endswith("14")
    step = PoissonSampled(0.05, Gaussian(2.0))
    planned = LedgerFile("planned.ledger", budget=Budget(epsilon=3.0, delta=1e-5)).remaining(step)
    adaptive = LedgerFile("adaptive.ledger", budget=names["adaptive"]).remaining(step)
    assert planned is not None
    assert adaptive is not None
    assert 0.7 * planned < adaptive < planned


def test_every_block_of_code_is_tested_and_every_error_named_exists() -> None:
    text = GUIDE.read_text()
    fences = re.findall(r"^```(.*)$", text, flags=re.MULTILINE)
    assert set(fences[::2]) == {"python"}
    assert set(fences[1::2]) == {""}
    for name in re.findall(r"\b(\w+Error)\b", text):
        assert hasattr(errors, name), name
