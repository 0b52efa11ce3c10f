"""`dpdl federated` in this process, on images so small that a run takes a moment."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from accountants.commands.one_line_parser import OneLineParser
from dpdl.data import ImageData, load
from dpdl.errors import PrivacyError
from dpdl.federated import command, resumable_run

SMALL = ["--model", "logistic", "--clients", "3", "--rounds", "2", "--local-steps", "2", "--batch-size", "20"]
QUICK = [*SMALL, "--noise-multiplier", "2", "--insecure-seed", "3"]
EXAMPLES = 300


def reads_small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the embedded digits: pixels that show their label, and a reader that knows no other data."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(EXAMPLES) % 3
    images = torch.rand(EXAMPLES, 1, 4, 4, generator=generator) / 2
    images[torch.arange(EXAMPLES), 0, 0, labels] = 1.0
    data = ImageData(
        train_images=images,
        train_labels=labels,
        test_images=images[:60],
        test_labels=labels[:60],
        classes=("a", "b", "c"),
        name="small images",
        source="memory",
    )
    monkeypatch.setattr(command, "load", lambda path: data if path is None else load(path))


def interrupts_after(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    """Ctrl-C comes in the midst of that round of the next run, and in no other run."""
    original, played = resumable_run.run_federated, [0]

    def interrupted(*arguments: Any, stop: Any, **more: Any) -> Any:
        def after_a_round() -> bool:
            played[0] += 1
            if played[0] == rounds:
                signal.raise_signal(signal.SIGINT)
            answer: bool = stop()
            return answer

        return original(*arguments, stop=after_a_round, **more)

    monkeypatch.setattr(resumable_run, "run_federated", interrupted)


def dpdl(*argv: str) -> int:
    """The command line with this one command; what `dpdl.cli.main` does with errors."""
    parser = OneLineParser(prog="dpdl")
    command.register(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["federated", *argv])
    try:
        code: int = arguments.run(arguments)
    except PrivacyError as error:
        print(f"dpdl: error: {error}", file=sys.stderr)
        return 2
    return code


def report_of(folder: Path) -> dict[str, Any]:
    """What the run has written."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report
