"""Certified truth: a dozen rows kept here, and the whole table where DPDL_REFERENCE names the file."""

from __future__ import annotations

import csv
import json
import os
import pathlib
import warnings

import pytest

from accountants import Event, PRVAccountant, RDPAccountant
from tests.accountants.reference_rows import event_of

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "certified_epsilon.json").read_text())["rows"]
TABLE = os.environ.get("DPDL_REFERENCE")


def check(event: Event, delta: float, low: float, high: float, width: float, relation: str = "add_or_remove") -> None:
    """Hard soundness on both sides; tightness within `width`, relative."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower, upper = PRVAccountant(relation=relation).compose(event).interval(delta)
        loose = RDPAccountant(relation=relation).compose(event).epsilon(delta)
    assert lower <= high
    assert upper >= low
    assert upper <= high * (1 + width)
    assert lower >= low * (1 - width)
    assert loose >= low * (1 - 1e-12)


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row["id"])
def test_interval_contains_the_certified_epsilon(row: dict) -> None:
    check(event_of(row["mechanisms"]), row["delta"], row["epsilon_low"], row["epsilon_high"], 1e-4)


def table_rows() -> list[dict[str, str]]:
    if TABLE is None:
        return []
    with open(TABLE, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.skipif(TABLE is None, reason="set DPDL_REFERENCE to the table of certified epsilons")
@pytest.mark.parametrize("row", table_rows(), ids=lambda row: row["id"])
def test_interval_contains_the_certified_epsilon_on_the_whole_table(row: dict[str, str]) -> None:
    event = event_of(json.loads(row["spec_json"]))
    relation = "replace_one" if row["adjacency"] == "replace_one" else "add_or_remove"
    check(event, float(row["delta"]), float(row["eps_true_lo"]), float(row["eps_true_hi"]), 1e-4, relation)


@pytest.mark.slow
@pytest.mark.skipif(TABLE is None, reason="set DPDL_REFERENCE to the table of certified epsilons")
@pytest.mark.parametrize("row", table_rows(), ids=lambda row: row["id"])
def test_renyi_is_no_looser_than_the_best_peer_on_the_whole_table(row: dict[str, str]) -> None:
    peers = [float(row[name]) for name in ("eps_rdp_opacus", "eps_rdp_dpacc") if row[name]]
    relation = "replace_one" if row["adjacency"] == "replace_one" else "add_or_remove"
    ours = RDPAccountant(relation=relation).compose(event_of(json.loads(row["spec_json"])))
    if peers:
        assert ours.epsilon(float(row["delta"])) <= min(peers) * (1 + 1e-9)
