"""A run that is saved, ended and resumed: the same run under a seed, and never the same noise without one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import dpdl
from accountants import NeighboringRelation
from dpdl.errors import CheckpointError
from dpdl.split.clip import JointClip
from dpdl.split.session import SplitRun
from tests.split.core.networks import Case, cases
from tests.split.core.runs import plan_of, run_of
from tests.split.core.whole_network import parameters

TOPOLOGIES = {case.name: case for case in cases()}


def weights(case: Case) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parameters(case).items()}


def saved(run: SplitRun, path: Path) -> dict[str, Any]:
    states = {"": run.client.state_dict(), **{name: server.state_dict() for name, server in run.servers.items()}}
    torch.save(states, path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def loaded(run: SplitRun, states: dict[str, Any]) -> SplitRun:
    run.client.load_state_dict(states[""])
    for name, server in run.servers.items():
        server.load_state_dict(states[name])
    return run


@pytest.mark.parametrize("joint", [False, True], ids=["part", "joint"])
@pytest.mark.parametrize("name", ["vanilla", "vertical", "chain"])
def test_a_seeded_run_goes_on_as_if_it_had_not_ended(name: str, joint: bool, tmp_path: Path) -> None:
    clip = JointClip(max_grad_norm=0.7) if joint else None
    plan = plan_of(noise_multiplier=1.0)
    straight, broken, resumed = (TOPOLOGIES[name].fresh() for _ in range(3))
    run_of(straight, plan, clip=clip).run(5)
    first = run_of(broken, plan, clip=clip)
    first.run(2)
    states = saved(first, tmp_path / "run.pt")
    second = loaded(run_of(resumed, plan, clip=clip), states)
    second.run(3)
    assert second.steps_taken == 5
    expected, found = weights(straight), weights(resumed)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_secure_run_remembers_its_spending_and_draws_other_noise(tmp_path: Path) -> None:
    execution = dpdl.Execution()
    ledger = dpdl.Ledger(relation=NeighboringRelation.ADD_OR_REMOVE)
    case = TOPOLOGIES["vanilla"].fresh()
    run = run_of(case, plan_of(noise_multiplier=1.0, sample_rate=1e-9, dataset_size=None), execution=execution)
    run.run(2)
    states = saved(run, tmp_path / "run.pt")
    ends = []
    for number in range(2):
        again = case.fresh()
        plan = plan_of(noise_multiplier=1.0, sample_rate=1e-9, dataset_size=None)
        second = loaded(run_of(again, plan, execution=execution, ledger=ledger), copy.deepcopy(states))
        assert second.steps_taken == 2 + number  # what went on from the same state before is counted, too
        second.run(1)
        ends.append(weights(again))
    assert all(not torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert ledger.releases == 2 + 1 + 1  # the two that were saved once, and each resumed run's own


def test_states_of_other_runs_are_refused_and_change_nothing(tmp_path: Path) -> None:
    run = run_of(TOPOLOGIES["vanilla"].fresh(), plan_of(noise_multiplier=1.0))
    run.run(1)
    states = saved(run, tmp_path / "run.pt")
    case = TOPOLOGIES["vanilla"].fresh()
    other = run_of(case, plan_of(noise_multiplier=2.0))
    before = weights(case)
    for party, state in ((other.client, states[""]), (other.client, states["server"])):
        with pytest.raises(CheckpointError):
            party.load_state_dict(state)
    assert other.steps_taken == 0
    now = weights(case)
    assert all(torch.equal(before[key], now[key]) for key in now)


def test_a_dataset_ledger_refuses_a_second_run_with_the_same_seed(tmp_path: Path) -> None:
    with dpdl.LedgerFile(tmp_path / "data.ledger") as ledger:
        run_of(TOPOLOGIES["vanilla"].fresh(), plan_of(noise_multiplier=1.0), ledger=ledger).run(1)
        again = run_of(TOPOLOGIES["vanilla"].fresh(), plan_of(noise_multiplier=1.0), ledger=ledger)
        with pytest.raises(dpdl.errors.LedgerError):
            again.run(1)
