"""What is published of a run that was chosen privately: the claim of run and choice, and nothing of the single run's.

A run's own report claims less than the choice costs, and says how many steps it took and what else its ledger held. So
the published row and report are made anew, with the epsilon of the selection. Files are copied as contents alone: when
they were written would tell which of the runs was chosen, and so how many there were.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from dpdl.privacy_report import PrivacyReport, rounded_up, shown_delta
from dpdl.tradeoff.row import Row

__all__ = ["CHOSEN", "REPORT", "published", "write_chosen"]

CHOSEN = "selected"  # the row's key, and the folder of what the run saved
REPORT = "report.json"
_OWN_REPORT = b"dpdl.report/"  # the schema's name, in a report and in what embeds one
_INSECURE = (
    "noise and sampling came from insecure_seed: whoever knows the seed can remove the noise, so the claim holds only "
    "against those who do not"
)
_ASSUMPTIONS = (
    "one record of the dataset is one example; a person with several records is protected less",
    "only the chosen run's weights, its score and this report leave the private side: how many runs there were, the "
    "other runs, and how long it took stay secret",
    "the score is of records that are no secret; the candidates and the law of the number of runs were fixed in "
    "advance; other runs on the data add to the total",
    "the model treats examples as it did when that was checked, on the first batch and now and then (engines loop and "
    "vmap compute each example on its own, whatever the model does)",
    "noise is added on a grid before rounding; how far that is from exact Gaussians is not in delta",
)


def published(found: Row, *, epsilon: float, target: float | None, mean: float, candidates: int) -> Row:
    """The row of the chosen run as it may leave the private side.

    Args:
        found: the run's own row.
        epsilon: upper bound at the row's delta on run and choice together.
        target: the budget of both that was asked for; None if plans were given.
        mean: of the number of runs.
        candidates: how many there were to draw from.
    """
    assert found.report is not None
    own = PrivacyReport.from_json(json.dumps(found.report))
    report = _report(own, epsilon=epsilon, mean=mean, candidates=candidates)
    return replace(
        found,
        key=CHOSEN,
        target=target,
        epsilon=epsilon,
        planned_epsilon=epsilon,
        seconds=None,
        report=json.loads(report.to_json()),
    )


def _report(own: PrivacyReport, *, epsilon: float, mean: float, candidates: int) -> PrivacyReport:
    """It lists no releases: readings of one run's steps would claim less than the choice costs."""
    note = (
        f"this run was chosen privately, out of a random number of runs (mean {mean:g}) drawn from {candidates} "
        f"candidates: epsilon <= {rounded_up(epsilon)} at delta = {shown_delta(own.delta)} is of the run and its "
        "choice together"
    )
    return PrivacyReport(
        epsilon=epsilon,
        epsilon_lower=0.0,
        delta=own.delta,
        relation=own.relation,
        unit=own.unit,
        sampling=own.sampling,
        mechanism=own.mechanism,
        accountant="Rényi moments of the best of a random number of runs (Papernot and Steinke, 2022), upper bound",
        steps=own.planned_steps,  # the claim is of all of them, whether or not the run took them
        planned_steps=own.planned_steps,
        sample_rate=own.sample_rate,
        noise_multiplier=own.noise_multiplier,
        max_grad_norm=own.max_grad_norm,
        expected_batch_size=own.expected_batch_size,
        secure_randomness=own.secure_randomness,
        assumptions=_ASSUMPTIONS,
        notes=(note,) if own.secure_randomness else (note, _INSECURE),
        versions=own.versions,
        planned_epsilon=epsilon,
    )


def write_chosen(row: Row, saved: Path | None, folder: Path) -> None:
    """What the chosen run saved, and its report, in a folder.

    Reports that the run saved by itself are left out: they claim the single run's epsilon.

    Args:
        row: as `published` made it.
        saved: the run's own folder; None if it saved nothing.
        folder: where to.
    """
    folder.mkdir(exist_ok=True)
    if saved is not None:
        shutil.copytree(saved, folder, copy_function=shutil.copyfile, ignore=_reports, dirs_exist_ok=True)
        for place, _, _ in os.walk(folder):
            os.utime(place)  # copytree gives folders the times of their originals
    (folder / REPORT).write_text(json.dumps(row.report, indent=2, allow_nan=False) + "\n")


def _reports(folder: str, names: Iterable[str]) -> set[str]:
    """Files of text that hold a report."""
    paths = [Path(folder) / name for name in names]
    texts = [path for path in paths if path.suffix in (".json", ".html", ".txt") and path.is_file()]
    return {path.name for path in texts if _OWN_REPORT in path.read_bytes()}
