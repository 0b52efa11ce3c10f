"""Split learning on real MNIST: accuracy, epsilon by adversary, and what a decoder recovers, side by side.

    DPDL_DATA=DIR python -m benchmarks.split_accuracy            # DIR/mnist holds the four IDX files
    python -m benchmarks.split_accuracy --data DIR --epochs 1    # quicker

One client with 6,000 images sends activations to a server. The attacker has 2,000 images of its own, computes
activations of them as the client does, and learns a decoder; it is measured on 1,000 of the client's images, on what
the server was sent of them (`dpdl.audit.decoder_attack`). An epsilon and a recovered variance answer different
questions: one bounds every attacker, the other is one attacker's success, and where it fails nothing is shown.

The frozen encoder of "release_once" is made from the public images: with their labels (a small network, eight numbers
wide), or without (their first eight principal components). What public images reach with nothing private is a row of
its own: an encoder with public labels knows that already. Labels of these runs go through randomised response, all
others are sent in clear.

Noise and sampling are secure; initial weights and decoders are seeded. Decoders are one hidden layer of 512 units.
Where a run is trained without privacy, its steps are neither clipped nor noised.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import split_accuracy_runs as settings
from benchmarks.environment import RESULTS, environment
from benchmarks.split_accuracy_runs import DELTA, EPOCHS, Images, Trained, cases, once_epochs, split_images
from dpdl.audit import A_FAILURE_PROVES_NOTHING, decoder_attack, distance_correlation
from dpdl.claims import Claim
from dpdl.privacy_report import rounded_up
from dpdl.split.nopeek import HEURISTIC

ATTACKED = 1000  # private images that the decoder is measured on
DECODER_EPOCHS = 15


def measured(images: Images, run: Trained) -> dict[str, Any]:
    """Accuracy, claims, and one attacker's success."""
    result: dict[str, Any] = {
        "accuracy": run.accuracy,
        "accuracy_on_released_rows": run.accuracy_sent,
        "claims": [] if run.report is None else [claim_of(claim) for claim in run.report.claims],
        "note": run.note,
    }
    if run.sent is not None and run.released is not None:
        x, public_x = images.private[0][:ATTACKED], images.public[0]
        sent = run.sent(torch.arange(ATTACKED))
        decoder = decoder_attack((public_x, run.released(public_x)), (x, sent), epochs=DECODER_EPOCHS)
        result["decoder_recovered_variance"] = decoder.recovered
        result["decoder_epoch"] = decoder.epoch
        result["distance_correlation"] = float(distance_correlation(x, sent))
    return result


def claim_of(claim: Claim) -> dict[str, Any]:
    return {**asdict(claim), "text": str(claim)}


def shown(claims: list[Mapping[str, Any]], adversary: str, unit: str) -> str:
    """The least epsilon that is claimed against somebody about a unit; a bound on the record holds for its halves."""
    epsilons = [
        claim["epsilon"]
        for claim in claims
        if claim["against"] == adversary and claim["unit"] in (unit, "record") and claim["epsilon"] is not None
    ]
    return rounded_up(min(epsilons)) if epsilons else "none"


def table_of(results: Mapping[str, Mapping[str, Any]]) -> Table:
    caption = f"epsilon at delta = {DELTA:g}; none: NO GUARANTEE. Recovered variance: {A_FAILURE_PROVES_NOTHING}. "
    table = Table(title="Split learning on MNIST", caption=f"{caption}NoPeek: {HEURISTIC}")
    table.add_column("run", no_wrap=True)
    for name in (
        "accuracy",
        "on released\nrows",
        "model\nconsumers",
        "server:\nrecord",
        "server:\nfeatures",
        "server:\nlabel",
        "decoder\nrecovers",
        "dCor_U²",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for name, result in results.items():
        table.add_row(name, *cells(result))
    return table


def cells(result: Mapping[str, Any]) -> list[str]:
    found = [f"{result['accuracy']:.1%}", f"{result['accuracy_on_released_rows']:.1%}"]
    if "decoder_recovered_variance" not in result:
        return [*found, *["nothing sent"] * 4, "-", "-"]
    asked = (("model consumers", "record"), *(("server", unit) for unit in ("record", "features", "label")))
    found += [shown(result["claims"], adversary, unit) for adversary, unit in asked]
    return [*found, f"{result['decoder_recovered_variance']:.1%}", f"{result['distance_correlation']:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the IDX files (default: $DPDL_DATA/mnist)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of training; release_once takes twice as many")
    parser.add_argument("--out", type=Path, default=RESULTS / "split_accuracy.json")
    arguments = parser.parse_args()
    path = arguments.data or (os.environ.get("DPDL_DATA") and str(Path(os.environ["DPDL_DATA"]) / "mnist"))
    if not path:
        parser.error("give --data DIR, or set DPDL_DATA to a folder that has mnist/ in it")
    torch.set_num_threads(1)
    console = Console(width=max(Console().width, 160))
    images = split_images(path)
    results: dict[str, dict[str, Any]] = {}
    for name, run in cases(images, arguments.epochs).items():
        begun = time.process_time()
        results[name] = measured(images, run())
        results[name]["cpu_seconds"] = round(time.process_time() - begun, 1)
        console.print(f"{name}: accuracy {results[name]['accuracy']:.1%}, {results[name]['cpu_seconds']} s")
    console.print(table_of(results))
    record = {
        "private": settings.PRIVATE,
        "public": settings.PUBLIC,
        "test": settings.TEST,
        "attacked": ATTACKED,
        "epochs": arguments.epochs,
        "expected_batch_size": settings.BATCH,
        "delta": DELTA,
        "noise_multiplier": settings.SIGMA,
        "max_grad_norm": settings.CLIP,
        "learning_rate": {
            "with noise": settings.PRIVATE_RATE,
            "without": settings.PLAIN_RATE,
            "release_once": settings.ONCE_RATE,
        },
        "release_once": {
            "width": settings.ONCE_WIDTH,
            "max_norm": settings.ONCE_NORM,
            "epochs": once_epochs(arguments.epochs),
        },
        "decoder_epochs": DECODER_EPOCHS,
        "label_epsilon": settings.LABEL_EPSILON,
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(
        json.dumps({"environment": environment(), "settings": record, "runs": results}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
