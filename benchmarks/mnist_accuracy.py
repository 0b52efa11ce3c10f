"""Test accuracy at epsilon <= 3 on full MNIST, in the setting of published tables.

    DPDL_DATA=DIR python -m benchmarks.mnist_accuracy            # DIR/mnist holds the four IDX files
    python -m benchmarks.mnist_accuracy --data DIR --seed 1

The model and the setting are those of Tramèr and Boneh, Differentially Private Learning Needs Better
Features (or Much More Data), ICLR 2021 (arXiv:2011.11660), end-to-end CNN on MNIST: the tanh CNN of
Papernot et al. (arXiv:2007.14191), batch 512, clipping norm 0.1, noise multiplier 1.23, 40 epochs, SGD with
learning rate 0.5 and momentum 0.9. Their table says 98.1 % at epsilon = 3, delta = 1e-5. Batches here are
Poisson-sampled, as the accounting assumes.

One thing differs: pixels are mapped from [0, 1] to [-1, 1]. `--published` leaves that out.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.environment import RESULTS, environment
from dpdl.data import load
from dpdl.plan import PrivacyPlan
from dpdl.report import result_table
from dpdl.training import HistoryPoint, Observer, Settings, train

PUBLISHED_ACCURACY = 0.981

SETTINGS = Settings(
    model="papernot-cnn",
    epochs=40,
    batch_size=512,
    epsilon=None,
    noise_multiplier=1.23,
    delta=1e-5,
    max_grad_norm=0.1,
    optimizer="sgd",
    lr=0.5,
    momentum=0.9,
    lr_schedule="constant",
    centred=True,
)
PUBLISHED = {"centred": False}


class _Bar(Observer):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("steps", total=None, last="")

    def started(self, plan: PrivacyPlan, step: int) -> None:
        self.progress.update(self.task, total=plan.steps, completed=step)

    def stepped(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def looked(self, point: HistoryPoint) -> None:
        last = f"epsilon <= {point.epsilon:.3f}, accuracy {point.test_accuracy:.2%}"
        self.progress.update(self.task, last=last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the IDX files (default: $DPDL_DATA/mnist)")
    parser.add_argument("--seed", type=int, help="insecure seed, to repeat a run; default: secure noise")
    parser.add_argument("--out", type=Path, default=RESULTS / "mnist_accuracy.json")
    parser.add_argument("--published", action="store_true", help="pixels in [0, 1]")
    arguments = parser.parse_args()
    path = arguments.data or (os.environ.get("DPDL_DATA") and str(Path(os.environ["DPDL_DATA"]) / "mnist"))
    if not path:
        parser.error("give --data DIR, or set DPDL_DATA to a folder that has mnist/ in it")

    pixels = PUBLISHED if arguments.published else {}
    settings = Settings(**{**asdict(SETTINGS), **pixels, "insecure_seed": arguments.seed})
    data = load(path)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[last]}"), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as output, Progress(*columns, console=Console(stderr=True)) as progress:
        result = train(settings, data, output=Path(output), observer=_Bar(progress))
    Console().print(result_table(result))
    final = result.history[-1].test_accuracy
    Console().print(f"published (arXiv:2011.11660): {PUBLISHED_ACCURACY:.1%} at epsilon 3; here {final:.2%}")
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps({"environment": environment(), **result.to_dict()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
