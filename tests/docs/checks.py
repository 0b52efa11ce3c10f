"""What else must be so after a page has run: figures that its text states, files that it wrote, names that it left."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest

from accountants import Gaussian, PoissonSampled
from dpdl import validation
from dpdl.budget import Budget
from dpdl.claims import AdversaryReport
from dpdl.ledger_file import LedgerFile
from tests.docs.blocks import DOCS
from tests.docs.programs import Program

__all__ = ["CHECKS"]


def readme(program: Program) -> None:
    claim = re.search(r"epsilon <= (\d\.\d\d) at delta = 1e-05, adding or removing one example; ", program.printed)
    assert claim is not None, program.printed
    assert 2.9 < float(claim[1]) <= 3.0


def ledger(program: Program) -> None:
    said = program.printed
    patients = LedgerFile("patients.ledger")
    assert [(entry.label, entry.count) for entry in patients.entries] == [("mean of the ages", 1), ("step", 30)]
    assert patients.budget == Budget(epsilon=3.0, delta=1e-5)
    assert "is weaker" in said
    assert "of a budget of 1; no further step fits" in said
    assert "The budget is spent" in said
    assert LedgerFile("hospital.ledger").epsilon(1e-5) <= 1.0
    assert said.strip().endswith("14")
    step = PoissonSampled(0.05, Gaussian(2.0))
    planned = LedgerFile("planned.ledger", budget=Budget(epsilon=3.0, delta=1e-5)).remaining(step)
    adaptive = LedgerFile("adaptive.ledger", budget=program.names["adaptive"]).remaining(step)
    assert planned is not None
    assert adaptive is not None
    assert 0.7 * planned < adaptive < planned


def fix(program: Program) -> None:
    assert isinstance(program.names["report"], validation.FixReport)
    for words in ("mixes examples", "1 replaced.", "-> GroupNorm(16, 16", "Examples are kept apart now.", "a constant"):
        assert words in program.printed
        assert words in (DOCS / "fix.md").read_text()


def deepee(program: Program) -> None:
    assert program.names["model"]._steps_taken == 5
    assert 0 < program.names["model"].current_epsilon < 8


def errors(program: Program) -> None:
    assert program.names["published"] == ["weights"]


def federated(program: Program) -> None:
    names, text = program.names, (DOCS / "federated.md").read_text()
    shown = re.search(r"against server, record: epsilon <= ([\d.]+)", text)
    assert shown is not None
    assert f"against server, record: epsilon <= {float(shown[1]):.2f} at delta = 1e-05, adding" in program.printed
    assert names["answer"].reason == "budget"
    assert isinstance(names["shared"], AdversaryReport)
    moments = names["ledger"].epsilon(1e-5)
    assert moments == pytest.approx(0.4, abs=0.05)
    assert f"epsilon {moments:.1f} at delta = 1e-5" in text
    composed = names["shared"].against("server")[0].epsilon
    assert composed is not None
    assert 3.0 < composed < 2 * max(names[name].epsilon(1e-5) for name in ("north", "south"))
    page = names["run"].report.to_html()
    assert "NO GUARANTEE" in page
    assert page.startswith("<!DOCTYPE html>")


def report(program: Program) -> None:
    assert program.printed.startswith("epsilon <= ")
    assert "at delta = 1e-05, adding or removing one example; " in program.printed
    assert "digest is not that of what it says" in program.printed
    assert (program.folder / "report.html").read_text().startswith("<!DOCTYPE html>")


def flower(program: Program) -> None:
    found = {line.split(" ")[0] for line in program.printed.splitlines()}
    assert {"F3", "F5", "F6", "F7", "F8", "F9", "F10", "per-round"} <= found


def split(program: Program) -> None:
    assert program.names["clinic"].steps_taken == 5
    said = program.printed
    assert "against server, record: NO GUARANTEE (activations are sent as they are; labels are sent in clear)" in said
    assert "against model consumers, record: epsilon <= 2.96 at delta = 1e-05" in said
    assert "against server, record: epsilon <= 8.09 at delta = 1e-05, replacing one record" in said
    assert "noise_multiplier: 1.2 here, 0.1 there" in said
    assert "30 steps were asked for, and the plan has 0 left of 30" in said
    assert (program.folder / "report.html").read_text().startswith("<!DOCTYPE html>")


def split_tutorial(program: Program) -> None:
    said = program.printed
    assert "epsilon <= 2.89 at delta = 1e-05" in said
    for epsilon in ("24.39", "10.00", "4.38"):
        assert f"epsilon {epsilon}" in said
    shares = [int(share) for share in re.findall(r"(\d+)%", said)]
    assert shares[0] > 75
    assert shares[1] > 80  # noise 0.5
    assert shares[3] < shares[2] < shares[1]
    assert shares[4] < shares[5]  # one modality, two
    assert program.names["run"].steps_taken == 100


def federated_tutorial(program: Program) -> None:
    names, said = program.names, program.printed
    assert re.search(r"against server, record: NO GUARANTEE .*its updates are sent without clipping or noise", said)
    plain, private = (names[run].history.last_evaluation["accuracy"] for run in ("plain", "private"))
    assert names["run"].history.last_evaluation["accuracy"] > 0.8
    assert plain > 0.8
    assert plain > private > 0.25  # secure noise: 0.44 was seen; a guess is right once in ten times
    history = names["private"].history
    epsilons = history.rounds[-1].client_epsilon
    assert all(epsilon <= names["budgets"][name] for name, epsilon in epsilons.items())
    assert history.refusals["budget"] >= 1
    assert all("island" in record.refused["budget"] for record in history.rounds if record.refused)
    sizes = dict(zip(names["names"], map(len, names["parts"]), strict=True))
    first = history.rounds[0].client_epsilon  # nobody has refused yet
    assert max(first, key=first.get) == min(sizes, key=sizes.__getitem__)
    assert names["of_clients"].history.last_evaluation["accuracy"] < 0.35
    phones = names["of_phones"]
    assert phones.history.last_evaluation["accuracy"] > 0.65
    assert phones.history.secret_participation
    assert 7.9 < phones.history.rounds[-1].server_epsilon <= 8.0
    for plot in ("hospitals.png", "phones.png"):
        assert (program.folder / plot).read_bytes()[:4] == b"\x89PNG"


CHECKS: Mapping[str, Callable[[Program], None]] = {
    "README.md": readme,
    "ledger.md": ledger,
    "fix.md": fix,
    "compat_deepee.md": deepee,
    "errors.md": errors,
    "federated.md": federated,
    "flower.md": flower,
    "report.md": report,
    "split.md": split,
    "tutorials/split.md": split_tutorial,
    "tutorials/federated.md": federated_tutorial,
}
