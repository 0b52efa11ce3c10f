"""What a run says of itself: NO GUARANTEE where nothing protects, and the ledger's figure for the trained network."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import dpdl
from accountants import Gaussian, NeighboringRelation, PRVAccountant
from dpdl.secure_random import RandomStream
from dpdl.split.claims_of_run import part_training
from dpdl.split.clip import JointClip, PartClip
from dpdl.split.cut_release import CutRelease
from dpdl.split.door import ReleaseDoor
from dpdl.split.graph import Head, Part, SplitGraph
from dpdl.split.part_training import PartTraining
from tests.split.core.networks import ROWS, Modules, cases, sum_of_cross_entropies
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


def two_heads(modules: Modules, *, own_labels_sent: bool = False) -> SplitGraph:
    """The client judges one task on the server's output, and the server another."""
    return SplitGraph(
        parts=(
            Part(name="bottom", module=modules["bottom"], party="client", inputs=("x",)),
            Part(name="middle", module=modules["middle"], party="server", inputs=("bottom",)),
        ),
        heads=(
            Head(
                name="own",
                party="server" if own_labels_sent else "client",
                part="middle",
                labels="y of own",
                loss_fn=sum_of_cross_entropies,
            ),
            Head(name="theirs", party="server", part="middle", labels="y of theirs", loss_fn=sum_of_cross_entropies),
        ),
        columns={"y of own": "client"},
    )


@pytest.mark.parametrize("with_door", [False, True])
def test_a_head_of_ones_own_beside_anothers_leaves_no_view_out(with_door: bool) -> None:
    """Gradients of the client's own head tell the server of its labels and records: said, and nothing claimed."""
    torch.manual_seed(0)
    y = torch.randint(3, (ROWS,))
    case = replace(
        TOPOLOGIES["vanilla"],
        modules={"bottom": nn.Linear(4, 5), "middle": nn.Linear(5, 3)},
        graph=two_heads,
        data={"x": torch.randn(ROWS, 4), "y of own": y, "y of theirs": y},
    )
    door = ReleaseDoor(
        activations=CutRelease(max_norm=1.0, noise_multiplier=8.0),
        training=PartTraining.private(noise_multiplier=0.5),
        ledger=dpdl.Ledger(relation=NeighboringRelation.REPLACE_ONE),
        stream=RandomStream.from_insecure_seed(5),
    )
    release = {"client": door} if with_door else None
    run = run_of(case, plan_of(noise_multiplier=1.0), release=release)
    run.run(2)
    report = run.report(DELTA)
    (server,) = report.against("server")
    assert not server.guaranteed
    assert "activations 'bottom'" in server.because
    assert "gradients of 'middle'" in server.because
    assert any("gradients" in line for line in report.not_covered) is with_door
    assert not any("labels 'y" in claim.because for claim in report.claims)


def test_labels_of_one_head_sent_beside_anothers_own_leave_no_view_out() -> None:
    torch.manual_seed(0)
    y = torch.randint(3, (ROWS,))
    case = replace(
        TOPOLOGIES["vanilla"],
        modules={"bottom": nn.Linear(4, 5), "middle": nn.Linear(5, 3)},
        graph=lambda modules: two_heads(modules, own_labels_sent=True),
        data={"x": torch.randn(ROWS, 4), "y of own": y, "y of theirs": y},
    )
    run = run_of(case, plan_of(noise_multiplier=1.0))
    run.run(2)
    (server,) = run.report(DELTA).against("server")
    assert not server.guaranteed
    assert "labels 'y of own'" in server.because


@pytest.mark.parametrize("of_run", [False, True])
@pytest.mark.parametrize("of_door", [False, True])
def test_a_claim_that_rests_on_an_insecure_seed_says_so(of_run: bool, of_door: bool) -> None:
    case = TOPOLOGIES["vanilla, labels with the server"].fresh()
    door = ReleaseDoor(
        activations=CutRelease(max_norm=1.0, noise_multiplier=8.0),
        training=PartTraining.private(noise_multiplier=2.0),
        ledger=dpdl.Ledger(relation=NeighboringRelation.REPLACE_ONE),
        stream=RandomStream.from_insecure_seed(5) if of_door else RandomStream.from_os(),
    )
    execution = dpdl.Execution(insecure_seed=5) if of_run else dpdl.Execution()
    run = run_of(case, plan_of(noise_multiplier=2.0), release={"client": door}, execution=execution)
    run.run(1)
    report = run.report(DELTA)
    claims = [claim for claim in report.claims if claim.guaranteed]
    assert {claim.against for claim in claims} >= {"model consumers", "server"}
    for claim in claims:
        assert any("insecure seed" in word for word in claim.assumes) is (of_run or of_door)
    assert any("insecure seed" in note for note in report.notes) is (of_run or of_door)


def test_a_bound_for_consumers_beside_several_receivers_says_the_seed_too() -> None:
    for seed, says in ((5, True), (None, False)):
        case = TOPOLOGIES["multi-task"].fresh()
        run = run_of(case, plan_of(noise_multiplier=2.0), execution=dpdl.Execution(insecure_seed=seed))
        run.run(1)
        (consumers,) = run.report(DELTA).against("model consumers")
        assert consumers.guaranteed
        assert any("insecure seed" in word for word in consumers.assumes) is says
