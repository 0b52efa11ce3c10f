"""What a step spends, when it is recorded, and what refusals leave as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dpdl
from accountants import Gaussian, NeighboringRelation, PoissonSampled
from dpdl.errors import BudgetExceededError, ChannelError, PlanExhaustedError
from dpdl.split.channel import Handler, Packet
from dpdl.split.clip import JointClip
from dpdl.split.direct_channel import DirectChannel
from dpdl.split.outlet import Departed, Leaving
from tests.split.core.networks import Case, cases
from tests.split.core.runs import plan_of, run_of
from tests.split.core.whole_network import parameters

TOPOLOGIES = {case.name: case for case in cases()}


def snapshot(case: Case) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parameters(case).items()}


def unchanged(case: Case, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], p) for name, p in parameters(case).items())


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_step_is_one_poisson_sampled_event_whatever_the_topology(name: str) -> None:
    run = run_of(TOPOLOGIES[name].fresh(), plan_of(noise_multiplier=1.3))
    run.run(3)
    expected = PoissonSampled(0.1, Gaussian(1.3))
    assert [(entry.event, entry.count) for entry in run.ledger.entries] == [(expected, 3)]
    for server in run.servers.values():
        # Who has records and does not draw them cannot know that they are drawn by chance.
        own = expected if server.party.columns is None else Gaussian(1.3)
        assert [(entry.event, entry.count) for entry in server.party.clients[0].run.ledger.entries] == [(own, 3)]


def test_a_step_is_recorded_before_anything_leaves() -> None:
    case = TOPOLOGIES["vanilla"].fresh()
    counts: list[int] = []

    def door(leaving: Leaving) -> Departed:
        counts.append(run.steps_taken)
        return Departed(rows=leaving.rows)

    run = run_of(case, plan_of(noise_multiplier=1.0), release=door)
    run.run(2)
    assert counts == [1] * 3 + [2] * 3  # labels, activations, gradients


def test_the_datasets_ledger_has_each_step_once() -> None:
    ledger = dpdl.Ledger(relation=NeighboringRelation.ADD_OR_REMOVE)
    run = run_of(TOPOLOGIES["chain"].fresh(), plan_of(noise_multiplier=1.0), ledger=ledger)
    run.run(3)
    assert ledger.releases == 3


def test_a_budget_ends_the_run_before_the_step_that_would_overspend() -> None:
    case = TOPOLOGIES["vanilla"].fresh()
    plan = plan_of(noise_multiplier=1.0)
    budget = dpdl.Budget(epsilon=plan.epsilon(1e-5) / 2, delta=1e-5)
    ledger = dpdl.Ledger(relation=NeighboringRelation.ADD_OR_REMOVE, budget=budget)
    run = run_of(case, plan, ledger=ledger)
    with pytest.raises(BudgetExceededError):
        run.run()
    taken, before = run.steps_taken, snapshot(case)
    assert 0 < taken < 50
    assert ledger.epsilon(1e-5) <= budget.epsilon
    with pytest.raises(BudgetExceededError):
        run.step()
    assert unchanged(case, before)
    assert run.steps_taken == taken


def test_the_plan_ends_the_run() -> None:
    case = TOPOLOGIES["vanilla"].fresh()
    run = run_of(case, plan_of(steps=2))
    run.run()
    before = snapshot(case)
    with pytest.raises(PlanExhaustedError):
        run.step()
    with pytest.raises(PlanExhaustedError, match="3 steps were asked for"):
        run.run(3)
    assert unchanged(case, before)


class Line:
    """Direct channels that count requests, and that can break."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.breaks = False

    def connect(self, handler: Handler) -> Any:
        def counted(packet: Packet) -> Packet:
            self.requests.append(packet.kind)
            if self.breaks and packet.kind == "step":
                raise ChannelError("the line is broken")
            return handler(packet)

        return DirectChannel(counted)


@pytest.mark.parametrize(
    ("name", "requests"),
    [("vanilla", 1), ("chain", 3), ("u-shaped", 2), ("multi-task", 2), ("vertical", 4)],
)
@pytest.mark.parametrize("joint", [False, True])
def test_round_trips_of_a_step(name: str, requests: int, joint: bool) -> None:
    line = Line()
    clip = JointClip(max_grad_norm=0.7) if joint else None
    run = run_of(TOPOLOGIES[name].fresh(), plan_of(), clip=clip, connect=line.connect)
    run.client.get_ready()
    line.requests.clear()
    for _ in range(3):
        run.step()
    assert len(line.requests) == 3 * requests


def test_a_broken_line_spends_the_step_and_changes_nothing() -> None:
    case, line = TOPOLOGIES["vanilla"].fresh(), Line()
    run = run_of(case, plan_of(noise_multiplier=1.0), connect=line.connect)
    run.step()
    line.breaks, before = True, snapshot(case)
    with pytest.raises(ChannelError, match="broken"):
        run.step()
    assert unchanged(case, before)
    assert run.steps_taken == 2
    line.breaks = False
    run.step()
    assert run.steps_taken == 3


@pytest.mark.parametrize("clip", [None, JointClip(max_grad_norm=0.7)], ids=["part", "joint"])
@pytest.mark.parametrize("name", ["vanilla", "u-shaped", "vertical", "vanilla, convolutions"])
def test_empty_batches_and_batches_of_one_are_steps(name: str, clip: Any) -> None:
    case = TOPOLOGIES[name].fresh()
    sizes: list[int] = []

    def door(leaving: Leaving) -> Departed:
        sizes.append(len(leaving.rows))
        return Departed(rows=leaving.rows)

    plan = plan_of(sample_rate=1 / 60, expected_batch_size=1, noise_multiplier=1.0)
    run = run_of(case, plan, clip=clip, release=door)
    for _ in range(12):
        before = snapshot(case)
        run.run(1)
        assert all(not torch.equal(before[n], p) for n, p in parameters(case).items())
    assert {0, 1} <= set(sizes)
    assert run.steps_taken == 12
