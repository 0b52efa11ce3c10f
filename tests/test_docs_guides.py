"""The code in short guides runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("guide", ["several_optimizers.md", "data_parallel.md"])
def test_the_examples_run(guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)  # as without torchrun
    text = (DOCS / guide).read_text()
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        for match in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
            before = "\n" * text[: match.start(1)].count("\n")  # so that errors show the guide's lines
            exec(compile(before + match.group(1), guide, "exec"), names)
    assert "optimizer" in names or "private_step" in names
