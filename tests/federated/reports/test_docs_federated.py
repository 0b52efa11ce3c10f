"""The guide to federated learning: its code runs as it stands, block after block, and its figures are right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dpdl.claims import AdversaryReport

GUIDE = Path(__file__).parents[3] / "docs" / "federated.md"


def blocks(text: str) -> list[tuple[int, str]]:
    """Each block of Python, and the line that it begins after."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in found]


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = GUIDE.read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for line, code in blocks(text):
            exec(compile("\n" * line + code, str(GUIDE), "exec"), names)  # so that errors show the guide's lines
    said = capsys.readouterr().out
    shown = float(re.search(r"against server, record: epsilon <= ([\d.]+)", text)[1])  # type: ignore[index]
    assert f"against server, record: epsilon <= {shown:.2f} at delta = 1e-05, adding or removing one record" in said
    assert names["answer"].reason == "budget"
    assert isinstance(names["shared"], AdversaryReport)
    north, south, shared = (names[k] for k in ("north", "south", "shared"))
    moments = names["ledger"].epsilon(1e-5)
    assert moments == pytest.approx(0.4, abs=0.05)
    assert f"epsilon {moments:.1f} at delta = 1e-5" in text
    composed = shared.against("server")[0].epsilon
    assert composed is not None
    assert 3.0 < composed < 2 * max(north.epsilon(1e-5), south.epsilon(1e-5))
    page = names["run"].report.to_html()
    assert "NO GUARANTEE" in page
    assert page.startswith("<!DOCTYPE html>")


def test_every_file_that_the_guide_links_to_is_there() -> None:
    for link in re.findall(r"\]\((?!http)([\w./-]+)", GUIDE.read_text()):
        assert (GUIDE.parent / link).exists(), link
