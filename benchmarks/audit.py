"""Does an audit find what is wrong? Empirical epsilon beside the claimed one, correct and with planted faults.

    DPDL_DATA=DIR python -m benchmarks.audit            # DIR/mnist holds the four IDX files
    python -m benchmarks.audit --data DIR --canaries 1000

Logistic regression (the linear model) and the tanh CNN train with `make_private` on 2,000 MNIST images, and on canaries
whose gradients are worst cases (`dpdl.audit.GradientCanaries`), each in by a fair coin. An audit sees every step of one
run, counts each canary as a run, and reports the largest epsilon that it refutes with 95% confidence. Above the claim
means: found. Each row is several audits, each of a run of its own; the table has the median bound, and how many refuted
the claim.

Two plans. "usual": 16 steps at rate 1/4, noise 1. Shuffled batches cannot be told from Poisson's at such noise by any
test that can be counted; they are audited by a plan that shows them, "little noise": 4 steps, noise 0.4, whose claim
protects nobody. Each plan has a correct run beside its faults.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks import audit_faults as faults
from benchmarks.audit_chart import draw_chart
from benchmarks.environment import RESULTS, environment
from dpdl.audit.gradient_canaries import GradientCanaries
from dpdl.audit.one_run import audit_gradients
from dpdl.audit.result import AuditResult
from dpdl.data import load
from dpdl.models import build_model
from dpdl.plan import PrivacyPlan
from dpdl.privacy_report import rounded_down, rounded_up
from dpdl.private import make_private

DELTA = 1e-5
CONFIDENCE = 0.95
IMAGES = 2000
CANARIES = 8000  # about half of them in the data
RATE = 1 / 4
REPEATS = 3
LEARNING_RATE = 0.5
PLANS = {"usual": (16, 1.0), "little noise": (4, 0.4)}  # steps, noise multiplier
MODELS = {"linear": "logistic", "MNIST CNN": "papernot-cnn"}
CASES = (
    ("usual", faults.CORRECT),
    ("usual", faults.HALVED),
    ("usual", faults.NO_CLIP),
    ("usual", faults.REUSED),
    ("little noise", faults.CORRECT),
    ("little noise", faults.SHUFFLED),
)


def plan_of(name: str, examples: int) -> PrivacyPlan:
    steps, noise = PLANS[name]
    return PrivacyPlan(
        sample_rate=RATE,
        expected_batch_size=RATE * examples,
        steps=steps,
        noise_multiplier=noise,
        max_grad_norm=1.0,
    )


def train(model: nn.Module, dataset: Dataset[Any], plan: PrivacyPlan) -> None:
    """The loop of any private training."""
    loader = DataLoader(dataset, batch_size=round(plan.expected_batch_size), shuffle=True)
    private, optimizer, batches = make_private(
        model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), loader, plan
    )
    while optimizer.steps_taken < plan.steps:
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(private(x), y).backward()
            optimizer.step()


def audited(model_name: str, case: tuple[str, str], images: TensorDataset, canaries: int) -> AuditResult:
    plan_name, fault = case
    torch.manual_seed(0)
    model = build_model(MODELS[model_name], in_channels=1, image_size=28, classes=10)
    audit = GradientCanaries(model, count=canaries)
    claimed = plan_of(plan_name, len(images))

    def run(model: GradientCanaries, dataset: Dataset[Any]) -> None:
        with faults.planted(fault):
            train(model, dataset, plan_of(plan_name, len(dataset)))  # type: ignore[arg-type]

    return audit_gradients(
        run,
        audit,
        dataset=images,
        delta=DELTA,
        confidence=CONFIDENCE,
        claimed_epsilon=claimed.epsilon(DELTA),
        curve=claimed,
        independent=True,
    )


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title="Empirical epsilon beside the claimed one",
        caption=f"at delta = {DELTA:g}; empirical: the median of lower bounds with confidence {CONFIDENCE:.0%}. "
        "A bound below the claim proves nothing.",
    )
    for name in ("model", "plan", "training", "claimed", "empirical", "refuted", "by", "CPU s"):
        table.add_column(name, justify="right" if name in ("claimed", "empirical", "CPU s") else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"],
            row["plan"],
            row["training"],
            rounded_up(row["claimed_epsilon"]),
            rounded_down(row["epsilon_lower"]),
            f"{row['refuted']} of {len(row['audits'])}",
            ", ".join(sorted({str(audit["details"]["statistic"]) for audit in row["audits"]})),
            f"{row['cpu_seconds']:.0f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the IDX files (default: $DPDL_DATA/mnist)")
    parser.add_argument("--canaries", type=int, default=CANARIES)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="audits of each row (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "audit.json")
    arguments = parser.parse_args()
    path = arguments.data or (os.environ.get("DPDL_DATA") and str(Path(os.environ["DPDL_DATA"]) / "mnist"))
    if not path:
        parser.error("give --data DIR, or set DPDL_DATA to a folder that has mnist/ in it")
    torch.set_num_threads(1)
    console = Console(width=max(Console().width, 140))
    data = load(path)
    images = TensorDataset(data.train_images[:IMAGES], data.train_labels[:IMAGES])
    rows = []
    for model in MODELS:
        for case in CASES:
            begun = time.process_time()
            results = [audited(model, case, images, arguments.canaries) for _ in range(arguments.repeats)]
            rows.append(
                {
                    "model": model,
                    "plan": case[0],
                    "training": case[1],
                    "claimed_epsilon": results[0].claimed_epsilon,
                    "epsilon_lower": statistics.median(result.epsilon_lower for result in results),
                    "refuted": sum(not result.consistent for result in results),
                    "cpu_seconds": round((time.process_time() - begun) / len(results), 1),
                    "audits": [result.to_dict() for result in results],
                }
            )
            console.print(f"{model}, {case[1]}: {results[0]}", highlight=False)
    console.print(table_of(rows))
    record = {
        "images": IMAGES,
        "canaries": arguments.canaries,
        "delta": DELTA,
        "confidence": CONFIDENCE,
        "repeats": arguments.repeats,
        "sample_rate": RATE,
        "learning_rate": LEARNING_RATE,
        "plans": {name: {"steps": steps, "noise_multiplier": noise} for name, (steps, noise) in PLANS.items()},
    }
    result_file = {"environment": environment(), "settings": record, "rows": rows}
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result_file, indent=2) + "\n")
    draw_chart(result_file, arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
