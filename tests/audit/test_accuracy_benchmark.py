"""The benchmark of accuracy beside epsilon and recovered variance: all its runs run, and it shows what was claimed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import split_accuracy, split_accuracy_runs
from benchmarks.split_accuracy_runs import Images, cases


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Images:
    """Few of them, made up: bright rows, more of them for higher labels."""
    monkeypatch.setattr(split_accuracy_runs, "PRIVATE", 64)
    monkeypatch.setattr(split_accuracy_runs, "PUBLIC", 40)
    monkeypatch.setattr(split_accuracy_runs, "BATCH", 16)
    monkeypatch.setattr(split_accuracy_runs, "ENCODER_EPOCHS", 2)
    monkeypatch.setattr(split_accuracy_runs, "ONCE_NOISE", (1.0,))
    monkeypatch.setattr(split_accuracy_runs, "ALPHAS", (1.0,))
    monkeypatch.setattr(split_accuracy, "ATTACKED", 20)
    monkeypatch.setattr(split_accuracy, "DECODER_EPOCHS", 1)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count in (64, 40, 30):
        y = torch.randint(10, (count,), generator=generator)
        x = torch.rand(count, 1, 28, 28, generator=generator) - 1
        x += (torch.arange(28)[None, None, :, None] < 2 * y[:, None, None, None]).float()
        parts.append((x, y))
    return Images(private=parts[0], public=parts[1], test=parts[2])


@pytest.mark.slow
def test_every_run_runs_and_says_what_is_promised_to_whom(images: Images) -> None:
    results: dict[str, dict[str, Any]] = {
        name: split_accuracy.measured(images, run()) for name, run in cases(images, 1).items()
    }
    assert [name for name, found in results.items() if not found["claims"]] == ["public images alone"]
    shown = {name: split_accuracy.cells(found) for name, found in results.items()}
    assert shown["public images alone"][2:6] == ["nothing sent"] * 4
    for name, (_, _, consumers, record, features, label, *_) in shown.items():
        if name.startswith("release_once"):
            assert "none" not in (consumers, record, features, label), name
            assert label == "5.00"
        elif name in ("part clipping", "joint clipping"):
            assert float(consumers) > 0
            assert (record, features, label) == ("none",) * 3
        elif name != "public images alone":
            assert (consumers, record, features, label) == ("none",) * 4, name
    assert {name for name, found in results.items() if "no formal guarantee" in found["note"]} == {
        name for name in results if name.startswith("NoPeek")
    }
    console = Console(width=200)
    with console.capture() as captured:
        console.print(split_accuracy.table_of(results))
    assert "no formal guarantee" in captured.get()


def test_the_least_bound_on_a_unit_is_shown_and_a_record_covers_its_halves() -> None:
    claims = [
        {"against": "server", "unit": "record", "epsilon": 3.001},
        {"against": "server", "unit": "label", "epsilon": 2.0},
        {"against": "server", "unit": "features", "epsilon": None},
    ]
    assert split_accuracy.shown(claims, "server", "record") == "3.01"
    assert split_accuracy.shown(claims, "server", "label") == "2.00"
    assert split_accuracy.shown(claims, "server", "features") == "3.01"
    assert split_accuracy.shown(claims, "model consumers", "record") == "none"
