"""The example in one process, as a simulation, and deployed: the same bits; and a client killed in mid-round."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from dpdl.federated import unanswered_rounds_of
from dpdl.ledger_file import LedgerFile
from tests.federated.flower.processes import deployment, has_flower, in_process, simulation

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_flower(), reason="Flower's commands are not installed")]
SETTINGS: dict[str, Any] = {"rounds": 2, "steps": 10, "insecure_seed": 1}


@pytest.mark.parametrize("number", [2, 10])
def test_a_simulation_gives_the_bits_of_one_process(tmp_path: Path, number: int) -> None:
    here = in_process(tmp_path, clients=number, **SETTINGS)
    there = simulation(tmp_path, clients=number, **SETTINGS)
    print(f"{number} clients: simulation {there['seconds']} s, in process {here['seconds']} s")
    assert there["state"] == here["state"]
    assert len(list((tmp_path / "ledgers").glob("*.ledger"))) == number


def test_a_deployment_gives_the_bits_of_one_process(tmp_path: Path) -> None:
    here = in_process(tmp_path, clients=2, **SETTINGS)
    with deployment(tmp_path, 2) as deployed:
        deployed.submit(**SETTINGS)
        there = deployed.outcome(timeout=400)
    print(f"2 clients: deployment {there['seconds']} s")
    assert there["state"] == here["state"]
    assert LedgerFile(tmp_path / "client-0.ledger").releases == 20


def test_a_client_killed_in_mid_round_is_lost_and_its_spending_is_not(tmp_path: Path) -> None:
    """It starts again, and takes part in a later round: no step of the lost one is forgotten, none counted twice."""
    steps = 1500
    with deployment(tmp_path, 2) as deployed:
        deployed.submit(rounds=3, steps=steps, timeout=240.0)
        ledger = tmp_path / "client-1.ledger"
        deployed.wait_for("round 1: 2 clients drawn", timeout=200)
        while (
            not ledger.exists() or LedgerFile(ledger).releases < steps
        ):  # the round is recorded before data is touched
            time.sleep(0.2)
        killed = time.monotonic()
        deployed.kill(1)
        broken_off = unanswered_rounds_of(LedgerFile(ledger))
        while not broken_off.look().new:  # until the killed process is gone, its round counts as under way
            time.sleep(0.2)
        broken_off.go_on(not_the_data="killed by its owner")  # or it would refuse
        deployed.start(1)
        deployed.wait_for("round 2: 2 clients drawn", timeout=300)
        noticed = time.monotonic() - killed
        outcome = deployed.outcome(timeout=600)
    print(f"killed in mid-round: the next round began {noticed:.0f} s later; {outcome}")
    first, *_, last = outcome["outcomes"]
    assert first == {"client-0": "accepted", "client-1": "lost"}
    assert last == {"client-0": "accepted", "client-1": "accepted"}
    answered = sum(round["client-1"] == "accepted" for round in outcome["outcomes"])
    assert LedgerFile(ledger).releases == (answered + 1) * steps
