"""`dpdl federated` as a user runs it: each scheme, its files, its claims, its errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from dpdl.budget import Budget
from dpdl.federated.history import History
from dpdl.ledger_file import LedgerFile
from dpdl.models import build_model
from tests.federated.runner.command_line import EXAMPLES, QUICK, SMALL, dpdl, reads_small_images, report_of

CLAIMED = {  # scheme: the units that have a guarantee against the server, other clients, model consumers
    "none": ((), (), ()),
    "record": (("record",), ("record",), ("record",)),
    "client": ((), ("client", "record"), ("client", "record")),
    "local": (("client", "record"), ("client", "record"), ("client", "record")),
    "both": (("record",), ("client", "record"), ("client", "record")),
}


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    reads_small_images(monkeypatch)


@pytest.mark.parametrize("scheme", CLAIMED)
def test_each_scheme_runs_and_claims_what_it_protects(
    scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dpdl(*QUICK, "--scheme", scheme, "--output", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    report = report_of(tmp_path)
    guaranteed: dict[str, set[str]] = {adversary: set() for adversary in report["adversaries"]}
    for claim in report["claims"]:
        if claim["guaranteed"]:
            guaranteed[claim["against"]].add(claim["unit"])
            assert 0 < claim["epsilon"] < 50
    found = tuple(guaranteed[adversary] for adversary in ("server", "other clients", "model consumers"))
    assert found == tuple(set(units) for units in CLAIMED[scheme])
    assert " ".join(report["text"].split()) in " ".join(shown.split())
    assert ("NO GUARANTEE" in shown) == (scheme != "local")
    plain = build_model("logistic", in_channels=1, image_size=4, classes=3)
    plain.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))


def test_the_files_say_what_happened(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["--partition", "dirichlet", "--alpha", "0.5", "--minimum", "50", "--epsilon", "6"]
    options += ["--plot", str(tmp_path / "federated.png")]
    assert dpdl(*SMALL, *options, "--output", str(tmp_path)) == 0
    report = report_of(tmp_path)
    federation = report["federation"]
    assert sum(federation["examples"]) == EXAMPLES
    assert min(federation["examples"]) >= 50
    assert len(set(federation["examples"])) > 1
    history = History.from_json(json.dumps(federation["history"]))
    rows = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert [row["accuracy"] for row in rows] == [str((r.evaluation or {})["accuracy"]) for r in history.rounds]
    for name, epsilon in (history.rounds[-1].client_epsilon or {}).items():
        ledger = LedgerFile(tmp_path / "ledgers" / f"{name}.ledger")
        assert 5.9 < epsilon == ledger.epsilon(1e-5) <= 6.0
        assert ledger.budget == Budget(epsilon=6.0, delta=1e-5)
        assert sum(entry.count for entry in ledger.entries) == 2 * 2
    assert (tmp_path / "federated.png").read_bytes()[:4] == b"\x89PNG"


def test_the_same_seeds_give_the_same_weights_and_other_ones_do_not(tmp_path: Path) -> None:
    def weights(name: str, *options: str) -> torch.Tensor:
        assert dpdl(*QUICK, *options, "--scheme", "both", "--output", str(tmp_path / name)) == 0
        loaded: torch.Tensor = torch.load(tmp_path / name / "model.pt", weights_only=True)["linear.weight"]
        return loaded

    first = weights("first")
    assert torch.equal(first, weights("again"))
    assert not torch.equal(first, weights("other noise", "--insecure-seed", "4"))
    assert not torch.equal(first, weights("other data", "--seed", "1"))


def test_json_prints_the_report_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dpdl(*QUICK, "--output", str(tmp_path), "--json") == 0
    assert json.loads(capsys.readouterr().out) == report_of(tmp_path)


def test_drawn_clients_are_a_secret_and_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*QUICK, "--scheme", "client", "--client-rate", "0.5", "--output", str(tmp_path)]
    assert dpdl(*options) == 0
    assert "publish the weights and the claims, not these" in " ".join(capsys.readouterr().err.split())
    assert report_of(tmp_path)["federation"]["history"]["secret_participation"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epsilon", "1", "--noise-multiplier", "1"], ["--epsilon", "--noise-multiplier"]),
        (["--client-epsilon", "1"], ["--client-epsilon", "both"]),
        (["--clients", "5000"], ["5000 clients", "300"]),
        (["--partition", "dirichlet", "--alpha", "0"], ["alpha", "0"]),
        (["--rounds", "0"], ["rounds", "0"]),
        (["--client-rate", "0"], ["client_rate", "0"]),
        (["--epsilon", "-1"], ["epsilon", "-1"]),
        (["--delta", "2"], ["delta", "2"]),
        (["--max-grad-norm", "0"], ["max_grad_norm", "0"]),
        (["--scheme", "client", "--max-update-norm", "0"], ["max_update_norm", "0"]),
        (["--scheme", "local", "--noise-multiplier", "0"], ["noise_multiplier", "0"]),
        (["--batch-size", "0"], ["batch_size", "0"]),
        (["--lr", "0"], ["lr", "0"]),
        (["--data", "no-such-folder"], ["no-such-folder"]),
    ],
)
def test_a_wrong_option_is_one_line_and_writes_no_report(
    options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert dpdl(*options, "--model", "logistic", "--output", str(folder)) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert not (folder / "report.json").exists()
    assert not (folder / "ledgers").exists()


def test_a_used_folder_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dpdl(*QUICK, "--output", str(tmp_path)) == 0
    before = (tmp_path / "ledgers" / "client-0.ledger").read_bytes()
    assert dpdl(*QUICK, "--output", str(tmp_path)) == 2
    assert "choose another --output" in capsys.readouterr().err
    assert (tmp_path / "ledgers" / "client-0.ledger").read_bytes() == before
