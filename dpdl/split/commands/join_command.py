"""`dpdl split join`: the data site. It has images, labels and the first layers, draws the batches and asks."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from accountants import NeighboringRelation
from dpdl.data import load
from dpdl.data.image_data import ImageData
from dpdl.errors import ChannelError, DataError, ParameterError, StepError
from dpdl.ledger_file import LedgerFile
from dpdl.plan import PrivacyPlan
from dpdl.split.client import SplitClient
from dpdl.split.commands.kept_state import load_state, save_state
from dpdl.split.commands.tutorial import (
    BYE,
    CLIENT,
    SERVER,
    add_settings,
    graph_of,
    key_of,
    optimizer_of,
    plan_of,
    signed_of,
)
from dpdl.split.grpc_channel import GrpcChannel
from dpdl.split.handshake import AgreedChannel
from dpdl.split.retrying import RetryingChannel
from dpdl.split.tls import MutualTLS
from dpdl.train_command import EXIT_STOPPED

__all__ = ["register"]

WEIGHTS = "client.pt"
LEDGER = "client.ledger"
REPORT = "report.json"
_PATIENCE = 120.0  # seconds in which a server that was restarted is found again
_FAILURES = 3  # sessions one after the other that may end before a step is taken
_SIDE = 28  # pixels, of the images that the network is for
_ROWS = 250  # at once, when testing

EXAMPLES = """examples:
  dpdl split join --certificates certificates                       with dpdl split serve on this machine
  dpdl split join --certificates keys --address lab.example:50061 --data mnist/ --json
"""


def register(subparsers: Any) -> None:
    """Add the command to an argparse parser's subparsers."""
    parser = subparsers.add_parser(
        "join",
        help="be the data site",
        description="Train the first layers on images that stay here, with `dpdl split serve` for the others. Started "
        "again with the same --output it takes the steps that are left: its ledger knows.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser.add_argument)
    add = parser.add_argument
    add("--data", metavar="PATH", help="MNIST's IDX files; without it, the digits that the extra 'demo' brings")
    add("--output", type=Path, default=Path("dpdl-split-client"), metavar="DIR", help="where weights, ledger and "
        "report go (default: %(default)s)")  # fmt: skip
    add("--steps", type=int, metavar="N", help="take only so many now")
    add("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command; the exit code."""
    messages = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    try:
        _join(arguments, messages)
    except KeyboardInterrupt:
        messages.print("Stopped. Go on with the same command: it takes the steps that are left.")
        return EXIT_STOPPED
    return 0


def _join(arguments: argparse.Namespace, messages: Console) -> None:
    if arguments.steps is not None and arguments.steps < 0:
        raise ParameterError(f"--steps must be >= 0, got {arguments.steps}. Leave it out to take all that are left.")
    plan, graph, folder, output = plan_of(arguments), graph_of(CLIENT), arguments.certificates, arguments.output
    signed = signed_of(graph, plan, arguments.delta, folder, CLIENT)
    data = _images(arguments, plan)
    output.mkdir(parents=True, exist_ok=True)
    line = RetryingChannel(GrpcChannel.connect(arguments.address, tls=MutualTLS.of(folder, CLIENT)))
    channel = AgreedChannel(line, signed, keys=key_of(folder, SERVER))
    with LedgerFile(output / LEDGER, relation=NeighboringRelation(plan.relation)) as ledger:
        if ledger.releases and not (output / WEIGHTS).exists():
            raise DataError(
                f"{output / LEDGER} has {ledger.releases} steps, and {output / WEIGHTS} is missing. Restore it."
            )
        client = SplitClient(
            graph,
            CLIENT,
            plan=plan,
            optimizer=optimizer_of(graph, CLIENT, arguments.lr),
            data={"x": data.train_images, "y": data.train_labels},
            channels={SERVER: channel},
            ledger=ledger,
            timeout=_PATIENCE,
        )
        if ledger.releases:
            load_state(client, output / WEIGHTS)
        taken = client.steps_taken
        left = max(0, plan.steps - taken)
        messages.print(f"{taken} of {plan.steps} steps are taken; manifest {signed.manifest.digest[:12]}")
        messages.print(f"Asking the server at {arguments.address}; Ctrl-C ends the waiting")
        save_state(client, output / WEIGHTS)
        now = left if arguments.steps is None else min(left, arguments.steps)
        for _ in track(range(now), description="training", console=messages):
            _step(client, messages)
            save_state(client, output / WEIGHTS)
        accuracy = _accuracy(client, data)
        report = client.report(arguments.delta)
        spent = ledger.epsilon(arguments.delta)
        told = {
            **report.to_dict(),
            "split": {
                "manifest": json.loads(signed.manifest.to_json()),
                "steps": ledger.releases,
                "dataset_epsilon": spent if math.isfinite(spent) else None,  # as claims say that there is no guarantee
                "test_accuracy": accuracy,
                "bytes_sent": channel.bytes_sent,
                "bytes_received": channel.bytes_received,
                "remark": "test images crossed the cut as they are, and are not covered by the guarantee",
            },
        }
    channel.request(BYE, {"session": client.session, "step": 0}, {}, timeout=_PATIENCE)
    channel.close()
    (output / REPORT).write_text(json.dumps(told, indent=2, allow_nan=False) + "\n")
    if arguments.json:
        sys.stdout.write(json.dumps(told, indent=2, allow_nan=False) + "\n")
    else:
        sys.stdout.write(f"{report}\n{_summary(told['split'])}\n")


def _summary(told: dict[str, Any]) -> str:
    return (
        f"{told['steps']} steps in all; test accuracy {told['test_accuracy']:.1%} (test images crossed the cut as they "
        f"are); {told['bytes_sent']:,} bytes sent, {told['bytes_received']:,} received"
    )


def _images(arguments: argparse.Namespace, plan: PrivacyPlan) -> ImageData:
    data = load(arguments.data)
    if len(data.train_images) != arguments.records:
        raise ParameterError(
            f"{data.name} has {len(data.train_images)} records to train on. Give both parties --records "
            f"{len(data.train_images)}: it is part of the terms."
        )
    if tuple(data.train_images.shape[1:]) != (1, _SIDE, _SIDE) or len(data.classes) != 10:
        raise DataError(f"This network is for grey images of {_SIDE} x {_SIDE} pixels in 10 classes, got {data}.")
    return data


def _step(client: SplitClient, messages: Console) -> None:
    """One step; where a step fails in transit, the next one, in a new session. What was spent stays spent."""
    for failures in range(_FAILURES):
        before = client.steps_taken
        try:
            client.step()
        except (ChannelError, StepError) as error:
            if failures == _FAILURES - 1:
                raise
            messages.print(f"A new session is begun: {error}")
            client.begin_anew()
            if client.steps_taken > before:
                return
        else:
            return


def _accuracy(client: SplitClient, data: ImageData) -> float:
    right = 0
    for images, labels in zip(data.test_images.split(_ROWS), data.test_labels.split(_ROWS), strict=True):
        (outputs,) = client.predict(images).values()
        right += int((outputs.argmax(dim=1) == labels).sum())
    return right / len(data.test_labels)
