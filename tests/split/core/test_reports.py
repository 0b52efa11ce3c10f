"""What a run says of itself: NO GUARANTEE where nothing protects, and the ledger's figure for the trained network."""

from __future__ import annotations

import math

import pytest

import dpdl
from accountants import Gaussian, NeighboringRelation, PRVAccountant
from dpdl.secure_random import RandomStream
from dpdl.split.claims_of_run import part_training
from dpdl.split.clip import JointClip, PartClip
from dpdl.split.cut_release import CutRelease
from dpdl.split.door import ReleaseDoor
from dpdl.split.part_training import PartTraining
from tests.split.core.networks import cases
from tests.split.core.runs import plan_of, run_of

TOPOLOGIES = {case.name: case for case in cases()}
DELTA = 1e-5


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_other_party_is_an_adversary_without_a_guarantee(name: str) -> None:
    run = run_of(TOPOLOGIES[name].fresh(), plan_of(noise_multiplier=1.0))
    run.run(3)
    report = run.report(DELTA)
    (consumers,) = report.against("model consumers")
    assert consumers.epsilon == run.epsilon(DELTA) > 0
    others = [claim for claim in report.claims if claim.against not in ("model consumers", "other clients")]
    assert others
    assert not any(claim.guaranteed for claim in others)
    assert str(report).count("NO GUARANTEE") >= len(others)


def test_without_noise_nothing_is_claimed() -> None:
    run = run_of(TOPOLOGIES["vanilla"].fresh(), plan_of(noise_multiplier=0.0))
    run.run(1)
    assert not any(claim.guaranteed for claim in run.report(DELTA).claims)


def test_a_doors_noise_is_claimed_against_who_gets_the_rows() -> None:
    case = TOPOLOGIES["vanilla, labels with the server"].fresh()
    ledger = dpdl.Ledger(relation=NeighboringRelation.REPLACE_ONE)
    plan = plan_of(noise_multiplier=2.0, sample_rate=1.0, expected_batch_size=60, max_grad_norm=1.0)
    door = ReleaseDoor(
        activations=CutRelease(max_norm=1.0, noise_multiplier=8.0),
        training=PartTraining.private(noise_multiplier=2.0 * math.sqrt(2)),
        ledger=ledger,
        stream=RandomStream.from_insecure_seed(5),
    )
    run = run_of(case, plan, release={"client": door})
    run.run(3)
    (server,) = run.report(DELTA).against("server")
    # three releases of each row (N(0, 8^2) against 2), and three steps of the bottom, unamplified
    mu = math.sqrt(3 * (2 / 8) ** 2 + 3 * (2 / (2 * math.sqrt(2))) ** 2)
    expected = PRVAccountant().compose(Gaussian(1 / mu)).epsilon(DELTA)
    assert server.epsilon == pytest.approx(expected, rel=2e-2)
    assert server.epsilon is not None
    assert server.epsilon >= expected * (1 - 1e-3)


def test_training_of_a_part_is_noised_relative_to_its_own_norm() -> None:
    norms = {"bottom": 0.3, "top": 0.4}
    for clip, own in ((PartClip(max_grad_norm=norms), 0.3), (JointClip(max_grad_norm=0.5), 0.5)):
        run = run_of(TOPOLOGIES["vanilla"].fresh(), plan_of(noise_multiplier=1.2, max_grad_norm=0.5), clip=clip)
        party = run.client.party
        found = part_training(party, party.client("client"))
        assert found.noise_multiplier == pytest.approx(1.2 * 0.5 / own)
