"""`dpdl train`: a private run on real images, with a progress bar, a closing table and a plot."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dpdl.checkpoint_format import read_tree
from dpdl.data import load
from dpdl.errors import CheckpointError, DataError, ParameterError
from dpdl.execution import EngineName
from dpdl.interrupts import held_interrupts
from dpdl.models import MODEL_NAMES
from dpdl.plan import PrivacyPlan
from dpdl.privacy_report import rounded_up
from dpdl.report import plot_history, report_page, result_table
from dpdl.training import (
    CHECKPOINT,
    REPORT,
    WEIGHTS,
    HistoryPoint,
    LrSchedule,
    Observer,
    OptimizerName,
    Settings,
    train,
)

__all__ = ["register"]

PLOT, PAGE = "training.png", "report.html"
EXIT_STOPPED = 130  # as after SIGINT

EXAMPLES = """examples:
  dpdl train                                        5,000 embedded MNIST digits, epsilon 3
  dpdl train --data mnist/ --batch-size 512         full MNIST from its IDX files
  dpdl train --data cifar-10-python.tar.gz          CIFAR-10
  dpdl train --data photos/ --model mlp             photos/train/CLASS/*.jpg, photos/test/CLASS/*.jpg
  dpdl train --resume --output dpdl-run             go on after Ctrl-C
"""


def register(subparsers: Any) -> None:
    """Add the command to an argparse parser's subparsers."""
    parser = subparsers.add_parser(
        "train",
        help="train an image classifier privately",
        description="Train an image classifier with DP-SGD and report the privacy that it cost.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Settings()
    add = parser.add_argument
    add("--data", metavar="PATH", help="MNIST IDX files, CIFAR-10 python batches, a folder of images by class or a "
        "tar of one; without it, the digits that the extra 'demo' brings")  # fmt: skip
    add("--output", metavar="DIR", type=Path, default=Path("dpdl-run"), help="where results go (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in --output, with its settings")
    add("--epsilon", type=float, help=f"privacy budget, from which the noise is computed (default: {default.epsilon})")
    add("--noise-multiplier", type=float, metavar="SIGMA", help="the noise itself, instead of --epsilon")
    add("--delta", type=float, help=f"(default: {default.delta})")
    add("--max-grad-norm", type=float, metavar="C", help=f"clipping norm (default: {default.max_grad_norm})")
    add("--epochs", type=int, help=f"(default: {default.epochs})")
    add("--batch-size", type=int, metavar="N", help=f"expected examples in a step (default: {default.batch_size})")
    add("--model", choices=MODEL_NAMES, help=f"(default: {default.model})")
    add("--centred", action="store_true", default=None, help="map pixels from [0, 1] to [-1, 1]")
    add("--optimizer", choices=get_args(OptimizerName), help=f"(default: {default.optimizer})")
    add("--lr", type=float, help=f"learning rate (default: {default.lr})")
    add("--momentum", type=float, help=f"of sgd (default: {default.momentum})")
    add("--lr-schedule", choices=get_args(LrSchedule), help=f"(default: {default.lr_schedule})")
    add(
        "--averaging", type=float, metavar="DECAY", help="test and save a moving average of the weights (default: none)"
    )
    add("--engine", choices=get_args(EngineName), help="(default: auto)")
    add("--max-physical-batch-size", type=int, metavar="N", help="most examples in memory at once")
    add("--device", help="(default: cpu)")
    add("--insecure-seed", type=int, metavar="SEED", help="reproducible noise; for research only, the report says so")
    add("--json", action="store_true", help="print the report as JSON instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command; the exit code."""
    messages = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    output: Path = arguments.output
    go_on = f"Go on with: dpdl train --resume --output {shlex.quote(str(output))}"
    data_path, settings = _resumed_settings(arguments) if arguments.resume else _settings(arguments)
    _refuse_missing_device(settings.device)
    with messages.status("Reading images"):
        data = load(data_path)
    messages.print(str(data))
    try:
        with held_interrupts() as interrupted, _ProgressBar(messages) as bar:
            result = train(
                settings,
                data,
                output=output,
                data_path=data_path,
                resume=arguments.resume,
                observer=bar,
                stop=lambda: bool(interrupted),
            )
    except KeyboardInterrupt:  # the second: the first waits for the end of the step
        saved = (output / CHECKPOINT).exists()
        messages.print(f"Stopped within a step. {go_on}" if saved else "Stopped. Nothing is saved yet.")
        return EXIT_STOPPED
    (output / PAGE).write_text(report_page(result.report, history=result.history), encoding="utf-8")
    written = [WEIGHTS, REPORT, PAGE, CHECKPOINT]
    try:
        title = f"Private training on {data.name}"
        plot_history(result.history, delta=settings.delta, title=title, path=output / PLOT)
        written.append(PLOT)
    except DataError as error:
        messages.print(f"No plot was written. {error}")
    messages.print(f"Written to {output}: {', '.join(written)}")
    if arguments.json:
        sys.stdout.write(json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n")
    else:
        Console().print(result_table(result))
    if not result.completed:
        messages.print(f"Stopped. {go_on}")
        return EXIT_STOPPED
    return 0


def _settings(arguments: argparse.Namespace) -> tuple[str | None, Settings]:
    given = _given(arguments)
    if "epsilon" in given and "noise_multiplier" in given:
        raise ParameterError("Give --epsilon or --noise-multiplier, not both: one determines the other.")
    if "noise_multiplier" in given:
        given["epsilon"] = None
    if (arguments.output / CHECKPOINT).exists():
        raise CheckpointError(
            f"{arguments.output} holds a run already. Go on with it by --resume, or choose another --output."
        )
    return arguments.data, Settings(**given)


def _resumed_settings(arguments: argparse.Namespace) -> tuple[str | None, Settings]:
    given = _given(arguments)
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ParameterError(f"--resume takes its settings from the saved run; leave out {options}.")
    path = arguments.output / CHECKPOINT
    if not path.exists():
        raise CheckpointError(f"There is no run to resume in {arguments.output}: {path} is missing.")
    extra = read_tree(path, named=path).get("extra")
    if not isinstance(extra, dict) or not {"data_path", "settings"} <= extra.keys():
        raise CheckpointError(f"{path} is not of dpdl train. Resume it with the program that wrote it.")
    return arguments.data or extra["data_path"], Settings.from_json(extra["settings"])


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that stood on the command line."""
    values = {f.name: getattr(arguments, f.name) for f in fields(Settings)}
    return {name: value for name, value in values.items() if value is not None}


def _refuse_missing_device(name: str) -> None:
    try:
        torch.zeros(1, device=name).item()  # what torch says of a driver that is missing, it says when it is used
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ParameterError(f"--device {name!r} cannot be used: {reason.rstrip('.')}. Give cpu, or cuda.") from error


class _ProgressBar(Observer):
    """Steps, accuracy and epsilon as they grow, on stderr."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epsilon <= {task.fields[epsilon]}  accuracy {task.fields[accuracy]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=None, epsilon="0.00", accuracy="-")

    def __enter__(self) -> _ProgressBar:
        return self  # the bar is drawn once there is a plan: what is refused before has none

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, plan: PrivacyPlan, step: int) -> None:
        """Show the plan."""
        self._progress.console.print(str(plan))
        self._progress.start()
        self._progress.update(self._task, total=plan.steps, completed=step)

    def stepped(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)

    def looked(self, point: HistoryPoint) -> None:
        """Show the numbers."""
        self._progress.update(self._task, epsilon=rounded_up(point.epsilon), accuracy=f"{point.test_accuracy:.1%}")
