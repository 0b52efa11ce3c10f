"""The guide to integrations, as it stands: each section is a program that runs."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

GUIDE = Path(__file__).parents[2] / "docs" / "integrations.md"
NEEDS = {
    "Lightning": "lightning",
    "Hugging Face Trainer": "transformers",
    "accelerate": "accelerate",
    "LoRA and other adapters": "peft",
    "Data pipelines": "torch",
}


def sections() -> dict[str, str]:
    text = GUIDE.read_text()
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def program(section: str) -> str:
    """The section's blocks of code, with empty lines before, so that errors show the guide's lines."""
    text = GUIDE.read_text()
    start = text.index(f"\n## {section}\n")
    end = text.find("\n## ", start + 1)
    lines, inside = [], False
    for line in text[: end if end > 0 else None].splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = inside != fence
    before = text[: start + 1].count("\n")
    return "\n".join([""] * before + lines[before:])


def test_every_section_is_run() -> None:
    assert sections().keys() == NEEDS.keys()
    assert set(re.findall(r"^```(.*)$", GUIDE.read_text(), flags=re.MULTILINE)) == {"python", ""}


@pytest.mark.parametrize("section", NEEDS)
def test_a_section_runs(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(NEEDS[section])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "guide"}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning|accelerate|torch")
        exec(compile(program(section), str(GUIDE), "exec"), names)
