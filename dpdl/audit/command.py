"""`dpdl audit`: attack a run that `dpdl train` has saved, or its training done again, and hold it against its claim."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import TensorDataset

from accountants import NeighboringRelation
from accountants.commands.plot_option import add_plot, refuse_what_cannot_be_drawn
from accountants.meaning.attacks import tpr_at_fpr
from dpdl.audit.curves import CurveName
from dpdl.audit.gradient_canaries import GradientCanaries
from dpdl.audit.likelihood_ratio import lira
from dpdl.audit.many_runs import audit_many_runs
from dpdl.audit.membership import Split, loss_threshold_attack, losses_of
from dpdl.audit.membership_result import LOW_RATES, MembershipResult
from dpdl.audit.one_run import audit_gradients
from dpdl.audit.result import AuditResult
from dpdl.audit.roc_plot import plot_roc
from dpdl.audit.saved_run import SavedRun, read_run
from dpdl.audit.shadow_models import train_shadow_models
from dpdl.errors import ParameterError
from dpdl.plan import PrivacyPlan
from dpdl.privacy_report import rounded_up

__all__ = ["register"]

EXIT_CONTRADICTED = 1
SHADOW_MODELS, RUNS, CANARIES = 16, 50, 2000
_SPLITS: tuple[Split, ...] = ("given", "random")
_ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE
_NO_EPSILON = (
    "No bound on epsilon: training and test images may differ by themselves. If they were split at random, say so by "
    "--split random; or use --method one-run, which draws coins."
)

EXAMPLES = """examples:
  dpdl train --model logistic --epochs 3 --output linear
  dpdl audit linear                          whom does the saved model give away? training against test images
  dpdl audit linear --method one-run         train again with canaries: does what each step releases fit the claim?
  dpdl audit linear --method lira --plot roc.png
  dpdl audit linear --method many-runs --runs 100

exit code: 0 the claim survives, 1 it is contradicted, 2 an error
"""


def register(subparsers: Any) -> None:
    """Add the command to an argparse parser's subparsers."""
    parser = subparsers.add_parser(
        "audit",
        help="attack a saved run and hold what is found against its claim",
        description="Attack a run that dpdl train has saved. An audit that finds nothing proves nothing; one that "
        "finds more than was claimed shows that something is broken.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run_directory", metavar="RUN", nargs="?", type=Path, default=Path("dpdl-run"), help="what dpdl train wrote "
        "(default: %(default)s)")  # fmt: skip
    add("--method", choices=tuple(_METHODS), default="membership", help="membership: losses of the saved model. The "
        "others train again as the run did: lira on random halves, one-run with canaries, many-runs with and without "
        "one mislabelled example (default: %(default)s)")  # fmt: skip
    add("--data", metavar="PATH", help="where the run's data is, if it has moved")
    add("--split", choices=_SPLITS, default="given", help="random: training and test images were split at random, so "
        "that membership bounds epsilon (default: %(default)s, no epsilon)")  # fmt: skip
    add("--models", type=int, metavar="N", default=SHADOW_MODELS, help="of lira (default: %(default)s)")
    add("--canaries", type=int, metavar="N", default=CANARIES, help="of one-run (default: %(default)s)")
    add("--runs", type=int, metavar="N", default=RUNS, help="of many-runs, of each kind (default: %(default)s)")
    add("--jobs", type=int, metavar="N", default=1, help="processes of lira (default: %(default)s)")
    add("--confidence", type=float, default=0.95, help="(default: %(default)s)")
    add_plot(parser, "the ROC of membership or lira")
    add("--json", action="store_true", help="print what was found as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command; the exit code."""
    messages = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    if arguments.plot and arguments.method not in ("membership", "lira"):
        raise ParameterError(f"--plot draws the ROC of membership or lira; {arguments.method} has none.")
    refuse_what_cannot_be_drawn(arguments.plot)
    if not 0 < arguments.confidence < 1:
        raise ParameterError(f"--confidence must be in (0, 1), got {arguments.confidence}.")
    saved = read_run(arguments.run_directory, data_path=arguments.data)
    messages.print(f"{saved.data}\n{saved.plan}")
    membership, audit = _METHODS[arguments.method](arguments, saved, messages)
    if arguments.json:
        found = {
            "schema": "dpdl.audit-run/1",
            "run": str(arguments.run_directory),
            "method": arguments.method,
            "membership": None if membership is None else membership.to_dict(),
            "audit": None if audit is None else audit.to_dict(),
            "consistent": None if audit is None else audit.consistent,
        }
        sys.stdout.write(json.dumps(found, indent=2, allow_nan=False) + "\n")
    else:
        _show(saved, membership, audit)
    if arguments.plot and membership is not None:
        event = saved.plan.event() if saved.plan.noise_multiplier else None
        plot_roc([membership], arguments.plot, event=event, title=f"{saved.data.name}, {arguments.run_directory}")
        messages.print(f"Written to {arguments.plot}")
    return EXIT_CONTRADICTED if audit is not None and not audit.consistent else 0


Found = tuple[MembershipResult | None, AuditResult | None]


def _membership(arguments: argparse.Namespace, saved: SavedRun, messages: Console) -> Found:
    found = loss_threshold_attack(
        saved.model,
        members=saved.members,
        non_members=saved.non_members,
        split=arguments.split,
        confidence=arguments.confidence,
    )
    if found.game is None:
        return found, None
    claimed = saved.epsilon(found.game.relation)
    return found, found.to_audit(delta=saved.delta, claimed_epsilon=claimed, curve=_curve(saved))


def _lira(arguments: argparse.Namespace, saved: SavedRun, messages: Console) -> Found:
    images, labels = saved.members
    shadows = train_shadow_models(
        saved.train_again, images, labels, models=arguments.models, jobs=arguments.jobs, console=messages
    )
    found = lira(shadows, confidence=arguments.confidence)
    return found, found.to_audit(delta=saved.delta, claimed_epsilon=saved.epsilon(_ADD_OR_REMOVE), curve=_curve(saved))


def _one_run(arguments: argparse.Namespace, saved: SavedRun, messages: Console) -> Found:
    again = saved.train_again
    canaries = GradientCanaries(again.new_model(), count=arguments.canaries).to(saved.settings.device)
    with messages.status("Training with canaries"):
        audit = audit_gradients(
            again.train,
            canaries,
            dataset=TensorDataset(*saved.members),
            delta=saved.delta,
            confidence=arguments.confidence,
            claimed_epsilon=saved.epsilon(_ADD_OR_REMOVE),
            curve=_curve(saved),
            independent=True,
        )
    return None, audit


def _many_runs(arguments: argparse.Namespace, saved: SavedRun, messages: Console) -> Found:
    again = saved.train_again
    images, labels = saved.members
    # One test image under a wrong label: nobody predicts it who was not taught to.
    image, label = saved.non_members[0][:1], (saved.non_members[1][:1] + 1) % len(saved.data.classes)
    numbers = iter(range(2 * arguments.runs))

    def once(present: bool) -> float:
        number = next(numbers)
        messages.print(f"run {number + 1} of {2 * arguments.runs}", end="\r")
        x = torch.cat([images, image]) if present else images
        y = torch.cat([labels, label]) if present else labels
        return -float(losses_of(again(x, y, number), image, label)[0])

    return None, audit_many_runs(
        once,
        runs=arguments.runs,
        delta=saved.delta,
        confidence=arguments.confidence,
        claimed_epsilon=saved.epsilon(_ADD_OR_REMOVE),
        curve=_curve(saved),
    )


_METHODS: Mapping[str, Callable[[argparse.Namespace, SavedRun, Console], Found]] = {
    "membership": _membership,
    "lira": _lira,
    "one-run": _one_run,
    "many-runs": _many_runs,
}


def _curve(saved: SavedRun) -> PrivacyPlan | CurveName:
    """The plan's own, which sees more than one (epsilon, delta); without noise there is none."""
    return replace(saved.plan, dataset_size=None) if saved.plan.noise_multiplier else "any"


def _show(saved: SavedRun, membership: MembershipResult | None, audit: AuditResult | None) -> None:
    console = Console(markup=False)
    if membership is not None:
        console.print(_rates(saved, membership))
        console.print(f"{membership}.", highlight=False, soft_wrap=True)
        for note in membership.notes:
            console.print(f"Note: {note}.", highlight=False, soft_wrap=True)
    if audit is None:
        console.print(_NO_EPSILON, highlight=False, soft_wrap=True)
        return
    console.print(f"{audit}.", highlight=False, soft_wrap=True)
    for heading, lines in (("Assumptions", audit.assumptions), ("Notes", audit.notes)):
        if lines:
            console.print(f"{heading}: {'; '.join(lines)}.", highlight=False, soft_wrap=True)


def _rates(saved: SavedRun, found: MembershipResult) -> Table:
    """What the attack reached beside the most that the claim allows anybody."""
    caption = f"AUC {found.auc:.3f}, advantage {found.advantage:.1%}; chance is 0.5 and 0"
    table = Table(title=f"Membership: {found.attack}", caption=caption)
    interval = f"{found.confidence:.0%} interval"
    for name in ("non-members accused", "members found", interval, "the claim allows"):
        table.add_column(name, justify="right")
    allowed = (
        tpr_at_fpr(saved.plan.event(), LOW_RATES, relation=_ADD_OR_REMOVE).tolist()
        if saved.plan.noise_multiplier
        else [1.0] * len(LOW_RATES)
    )
    for rate, most in zip((found.tpr_at(rate) for rate in LOW_RATES), allowed, strict=True):
        table.add_row(
            f"at most {rate.allowed:.1%}",
            f"{rate.tpr:.2%}",
            f"{rate.lower:.2%} to {rate.upper:.2%}",
            f"at most {rounded_up(100 * most)}%",
        )
    return table
