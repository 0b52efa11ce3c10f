"""The guide to `dpdl.check` and `dpdl.fix`, as it stands: its code runs, its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import dpdl
from dpdl import validation

GUIDE = Path(__file__).parents[2] / "docs" / "fix.md"


def blocks() -> list[str]:
    """Each block of Python, after as many empty lines as stand before it, so that errors show its lines."""
    text = GUIDE.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return ["\n" * text[: match.start(1)].count("\n") + match.group(1) for match in found]


def test_the_examples_run_and_print_what_they_show(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks():
            exec(compile(block, str(GUIDE), "exec"), names)
    assert isinstance(names["report"], validation.FixReport)
    printed = capsys.readouterr().out
    for words in ("mixes examples", "1 replaced.", "-> GroupNorm(16, 16", "Examples are kept apart now.", "a constant"):
        assert words in printed
        assert words in GUIDE.read_text()


def test_the_functions_that_it_names_are_public() -> None:
    text = GUIDE.read_text()
    named = set(re.findall(r"`(\w+_norm\w*|instance_\w+|replace_modules|fix|check)\(", text))
    assert {"batch_norm_to_group_norm", "batch_norm_to_layer_norm", "batch_norm_to_instance_norm"} <= named
    assert named <= set(validation.__all__)
    assert {name for name in validation.__all__ if name.startswith(("batch_norm_to", "instance_norm"))} <= named


def test_what_it_shows_is_under_its_public_name() -> None:
    assert dpdl.fix is validation.fix
    assert dpdl.fix_report is validation.fix_report
