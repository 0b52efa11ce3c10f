"""`dpdl federated`: clients and a server in one process, with a claim for each adversary and a plot."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from accountants.commands.plot_option import add_plot, refuse_what_cannot_be_drawn
from dpdl.data import load
from dpdl.errors import CheckpointError, ParameterError
from dpdl.federated.history import History
from dpdl.federated.image_federation import (
    FederationSettings,
    ImageFederation,
    PartitionName,
    Scheme,
    build_federation,
)
from dpdl.federated.plot import plot_federated
from dpdl.federated.resumable_run import EndedRun, begin, gone_on, play
from dpdl.federated.saved_run import SavedRun
from dpdl.interrupts import held_interrupts
from dpdl.models import MODEL_NAMES
from dpdl.privacy_report import rounded_up
from dpdl.train_command import EXIT_STOPPED
from dpdl.training import CHECKPOINT, REPORT, WEIGHTS

__all__ = ["register"]

TABLE, LEDGERS = "history.csv", "ledgers"
MOST_SHOWN = 12  # clients in the closing table

EXAMPLES = """examples:
  dpdl federated                                       five clients, DP-SGD at each, the embedded digits
  dpdl federated --scheme none --rounds 5              without privacy: what it costs is the difference
  dpdl federated --partition dirichlet --alpha 0.5 --plot epsilon.png
  dpdl federated --scheme client --clients 500 --client-rate 0.2 --rounds 40 --local-steps 5
  dpdl federated --scheme both --client-epsilon 20 --data mnist/ --html claims.html
  dpdl federated --resume --output dpdl-federated      go on after Ctrl-C
"""


def register(subparsers: Any) -> None:
    """Add the command to an argparse parser's subparsers."""
    parser = subparsers.add_parser(
        "federated",
        help="train an image classifier at several clients",
        description="Federated training in one process, with record-level privacy at the clients, client-level privacy "
        "at the server, both, noise on each client's update, or none; reported for each adversary.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = FederationSettings()
    add = parser.add_argument
    add("--scheme", choices=get_args(Scheme), help=f"what protects (default: {default.scheme})")
    add("--clients", type=int, metavar="N", help=f"(default: {default.clients})")
    add("--rounds", type=int, metavar="N", help=f"(default: {default.rounds})")
    add("--client-rate", type=float, metavar="Q", help="each client's chance to be in a round (default: 1, all are)")
    add("--partition", choices=get_args(PartitionName), help=f"of the examples (default: {default.partition})")
    add("--alpha", type=float, help=f"of dirichlet; the smaller, the less even (default: {default.alpha})")
    add("--shards-per-client", type=int, metavar="N", help=f"of shards (default: {default.shards_per_client})")
    add("--minimum", type=int, metavar="N", help=f"fewest examples of a client (default: {default.minimum})")
    add("--data", metavar="PATH", help="MNIST IDX files, CIFAR-10, or images by class, as for dpdl train; without it, "
        "the digits that the extra 'demo' brings")  # fmt: skip
    add("--output", metavar="DIR", type=Path, default=Path("dpdl-federated"), help="(default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in --output, with its settings and ledgers")
    add("--not-the-data", metavar="REASON", help="with --resume, after a process was killed: what ended the round that "
        "it was in, such as 'power cut'; the report cites it")  # fmt: skip
    add("--epsilon", type=float, help="budget of the scheme's guarantee, over all rounds, from which the noise is "
        f"computed (default: {default.epsilon}); with both, of a record")  # fmt: skip
    add("--client-epsilon", type=float, help=f"with both, of a client (default: {default.client_epsilon})")
    add("--noise-multiplier", type=float, metavar="SIGMA", help="the noise itself, instead of --epsilon")
    add("--delta", type=float, help=f"(default: {default.delta})")
    add("--max-grad-norm", type=float, metavar="C", help=f"of DP-SGD (default: {default.max_grad_norm})")
    add("--max-update-norm", type=float, metavar="S", help=f"of a client's update (default: {default.max_update_norm})")
    add("--local-steps", type=int, metavar="N", help=f"of a client in a round (default: {default.local_steps})")
    add("--batch-size", type=int, metavar="N", help=f"expected, in a local step (default: {default.batch_size})")
    add("--model", choices=MODEL_NAMES, help=f"(default: {default.model})")
    add("--lr", type=float, help=f"of the clients (default: {default.lr})")
    add("--momentum", type=float, help=f"of the clients (default: {default.momentum})")
    add("--server-lr", type=float, help=f"(default: {default.server_lr})")
    add("--seed", type=int, help=f"of partition and first weights (default: {default.seed})")
    add("--insecure-seed", type=int, metavar="SEED", help="reproducible noise; for research only, the report says so")
    add("--json", action="store_true", help="print the report as JSON instead of text")
    add("--html", metavar="PAGE", type=Path, help="write the claims as a web page of its own")
    add_plot(parser, "accuracy and every client's epsilon over the rounds")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command; the exit code."""
    messages = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    output: Path = arguments.output
    saved = _resumed(arguments) if arguments.resume else None
    settings = _settings(arguments) if saved is None else saved.settings
    _refuse_what_cannot_be_written(arguments)
    data_path = arguments.data if saved is None else arguments.data or saved.data_path
    with messages.status("Reading images"):
        data = load(data_path)
    messages.print(str(data))
    federation = build_federation(settings, data, ledgers=output / LEDGERS)
    if federation.plan is not None:
        messages.print(str(federation.plan))
    if saved is None:
        output.mkdir(parents=True, exist_ok=True)
        saved = begin(federation, settings, data=data.name, data_path=data_path)
    else:
        saved = gone_on(federation, saved, data=data.name, not_the_data=arguments.not_the_data)
    how = f"dpdl federated --resume --output {shlex.quote(str(output))}"
    try:
        with held_interrupts() as interrupted:
            ended = play(federation, saved, file=output / CHECKPOINT, progress=messages, stop=lambda: bool(interrupted))
    except KeyboardInterrupt:  # the second: the first waits for the end of the round
        messages.print(f"Stopped within a round. Go on with: {how} --not-the-data Ctrl-C")
        return EXIT_STOPPED
    _write(ended, federation, arguments, messages)
    if ended.why:
        messages.print(ended.why)
    if not ended.saved.finished:
        messages.print(f"Go on with: {how}")
        return EXIT_STOPPED
    return 0


def _write(ended: EndedRun, federation: ImageFederation, arguments: argparse.Namespace, messages: Console) -> None:
    """Everything that a run leaves, on the terminal and in files."""
    output: Path = arguments.output
    settings, history = ended.saved.settings, ended.saved.history
    report = {
        **ended.report.to_dict(),
        "federation": {
            "settings": asdict(settings),
            "data": ended.saved.data,
            "examples": list(federation.sizes),
            "stopped": ended.why or None,
            "completed": ended.saved.finished,
            "history": history.to_dict(),
            "remark": "test images are not covered by the guarantee; their accuracy is published without noise",
        },
    }
    with (output / WEIGHTS).open("wb") as file:  # given a path, torch has an error of its own for a full disk
        torch.save(federation.server.state, file)
    (output / REPORT).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    (output / TABLE).write_text(history.to_csv())
    written = [WEIGHTS, REPORT, TABLE, CHECKPOINT, f"{LEDGERS}/"]
    if arguments.plot is not None and history.rounds:
        title = f"Scheme {settings.scheme}, {settings.clients} clients, {ended.saved.data}"
        plot_federated(history, arguments.plot, title=title)
        messages.print(f"The plot: {arguments.plot}")
    messages.print(f"Written to {output}: {', '.join(written)}")
    if arguments.html is not None:
        arguments.html.write_text(ended.report.to_html(), encoding="utf-8")
        messages.print(f"The claims as a page: {arguments.html}")
    if history.secret_participation:
        messages.print(
            f"{REPORT}, {TABLE}, {CHECKPOINT}, {LEDGERS}/, the plot and the page of claims show who took part, on "
            "which the claim counts as a secret: publish the weights and the claims, not these."
        )
    if arguments.json:
        sys.stdout.write(json.dumps(report, indent=2, allow_nan=False) + "\n")
    else:
        Console(markup=False).print(_table(history, federation))
        Console(markup=False).print(str(ended.report), highlight=False)


def settings_given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that stood on the command line."""
    values = {f.name: getattr(arguments, f.name) for f in fields(FederationSettings)}
    return {name: value for name, value in values.items() if value is not None}


def _settings(arguments: argparse.Namespace) -> FederationSettings:
    given = settings_given(arguments)
    output: Path = arguments.output
    if arguments.not_the_data is not None:
        raise ParameterError("--not-the-data is about a run that was stopped: give it with --resume.")
    if any((output / name).exists() for name in (CHECKPOINT, REPORT, LEDGERS)):
        raise CheckpointError(
            f"{output} holds a run already, and what its clients have spent. Go on with it by --resume, or choose "
            "another --output."
        )
    if "epsilon" in given and "noise_multiplier" in given:
        raise ParameterError("Give --epsilon or --noise-multiplier, not both: one determines the other.")
    if "client_epsilon" in given and given.get("scheme") != "both":
        raise ParameterError("--client-epsilon is of --scheme both; the others have one guarantee, by --epsilon.")
    if "noise_multiplier" in given:
        given["epsilon"] = None
    return FederationSettings(**given)


def _resumed(arguments: argparse.Namespace) -> SavedRun:
    given = settings_given(arguments)
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ParameterError(f"--resume takes its settings from the saved run; leave out {options}.")
    return SavedRun.read(arguments.output / CHECKPOINT)


def _refuse_what_cannot_be_written(arguments: argparse.Namespace) -> None:
    """Before hours of training: whatever was asked for can be made."""
    refuse_what_cannot_be_drawn(arguments.plot)
    page: Path | None = arguments.html
    if page is None:
        return
    if page.is_dir() or not page.parent.is_dir() or not os.access(page if page.exists() else page.parent, os.W_OK):
        raise ParameterError(f"--html: {page} cannot be written. Give the name of a file in a folder that exists.")


def _table(history: History, federation: ImageFederation) -> Table:
    """One row a client: what it has, how often it answered, what it spent. Bounds are rounded to the safe side."""
    rounds = history.rounds
    accuracy = (history.last_evaluation or {}).get("accuracy", math.nan)
    played = federation.server.round
    table = Table(title=f"Federated training: {accuracy:.2%} of test images right after {played} rounds")
    for column in ("client", "examples", "rounds", "refused", "epsilon"):
        table.add_column(column, style="bold" if column == "client" else None)
    epsilons = (rounds[-1].client_epsilon if rounds else None) or {}
    for name, size in list(zip(federation.clients, federation.sizes, strict=True))[:MOST_SHOWN]:
        epsilon = epsilons.get(name)
        table.add_row(
            name,
            f"{size:,}",
            str(sum(name in r.answered for r in rounds)),
            str(sum(name in names for r in rounds for names in r.refused.values())),
            "not asked" if epsilon is None else "none" if math.isinf(epsilon) else f"<= {rounded_up(epsilon)}",
        )
    if len(federation.clients) > MOST_SHOWN:
        table.caption = f"and {len(federation.clients) - MOST_SHOWN:,} more"
    return table
