"""What a party asks of its door before a step is spent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dpdl
from accountants import NeighboringRelation
from dpdl.errors import BudgetExceededError, ParameterError
from dpdl.ledger import Ledger
from dpdl.secure_random import RandomStream
from dpdl.split.cut_release import CutRelease
from dpdl.split.door import Once, ReleaseDoor
from dpdl.split.part_training import PartTraining
from dpdl.split.row_cache import RowCache
from dpdl.split.topologies import vanilla
from tests.split.core.networks import cases, sum_of_cross_entropies
from tests.split.core.runs import plan_of, run_of

TOPOLOGIES = {case.name: case for case in cases()}
REPLACE_ONE = NeighboringRelation.REPLACE_ONE


def test_a_door_without_budget_costs_no_steps() -> None:
    budget = dpdl.Budget(epsilon=6.0, delta=1e-5)
    held = Ledger(relation=REPLACE_ONE, budget=budget)
    door = ReleaseDoor(
        activations=CutRelease(max_norm=1.0, noise_multiplier=4.0),
        training=PartTraining.private(noise_multiplier=2.0 * 2**0.5),
        ledger=held,
        stream=RandomStream.from_os(),
    )
    case = TOPOLOGIES["vanilla, labels with the server"].fresh()
    run = run_of(case, plan_of(noise_multiplier=2.0), release={"client": door})
    with pytest.raises(BudgetExceededError):
        run.run()
    taken, at_server = run.steps_taken, run.servers["server"].party.clients[0].run.steps_taken
    assert 0 < taken < 50
    assert held.epsilon(1e-5) <= 6.0
    for _ in range(3):
        with pytest.raises(BudgetExceededError, match="another batch"):
            run.step()
    assert run.steps_taken == taken == at_server
    assert run.servers["server"].party.clients[0].run.steps_taken == at_server


def test_rows_are_released_once_only_from_an_encoder_that_is_looked_at(tmp_path: Path) -> None:
    case = TOPOLOGIES["vanilla"].fresh()
    bottom, top = (case.modules[name] for name in ("bottom", "top"))
    bottom.requires_grad_(False)
    door = ReleaseDoor(
        activations=CutRelease(max_norm=1.0, noise_multiplier=4.0, mode="release_once"),
        training=PartTraining.frozen(),
        ledger=Ledger(relation=REPLACE_ONE),
        stream=RandomStream.from_os(),
        once=Once(encoder=bottom, inputs=lambda numbers: case.data["x"][numbers], cache=RowCache(tmp_path / "rows")),
    )
    graph = vanilla(bottom, top, sum_of_cross_entropies)
    optimizers = {"server": torch.optim.SGD(top.parameters(), lr=0.1)}
    with pytest.raises(ParameterError, match="self_check"):
        dpdl.split.SplitRun(
            graph,
            optimizers,
            case.data,
            plan_of(noise_multiplier=1.0),
            release={"client": door},
            execution=dpdl.Execution(self_check=False),
        )
