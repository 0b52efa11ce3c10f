"""Each topology is the network in one piece: sums of clipped gradients, the noise's scale, and predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dpdl
from dpdl.errors import EngineMismatchError
from tests.split.core.networks import cases
from tests.split.core.runs import Mechanism, batches, clips, plan_of, run_of
from tests.split.core.whole_network import clipped_sums, distance

EXACT = 1e-12
TOPOLOGIES = {case.name: case for case in cases()}
every_topology = pytest.mark.parametrize("name", TOPOLOGIES)


@every_topology
@pytest.mark.parametrize("kind", ["none", "part", "joint"])
def test_sums_are_those_of_the_whole_network_row_by_row(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = TOPOLOGIES[name].fresh()
    clip, part, joint, total = clips(case, kind)
    mechanism = Mechanism().use(monkeypatch)
    run = run_of(case, plan_of(max_grad_norm=total), clip=clip, rate=0.0)
    run.run(4)
    drawn = batches(run, 4)
    assert max(map(len, drawn)) > 3
    for number, rows in enumerate(drawn):
        expected = clipped_sums(case, rows, part=part, joint=joint)
        assert distance(mechanism.sums[number], expected) < EXACT
        assert mechanism.examples[number] == {len(rows)}


@pytest.mark.parametrize("engine", ["tape", "vmap", "loop"])
def test_every_engine_gives_the_same_sums(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = TOPOLOGIES["vanilla, convolutions"].fresh()
    clip, part, joint, total = clips(case, "part")
    mechanism = Mechanism().use(monkeypatch)
    execution = dpdl.Execution(insecure_seed=11, engine=engine, accumulate_dtype=torch.float64)
    run = run_of(case, plan_of(max_grad_norm=total), clip=clip, rate=0.0, execution=execution)
    run.run(2)
    for number, rows in enumerate(batches(run, 2)):
        assert distance(mechanism.sums[number], clipped_sums(case, rows, part=part, joint=joint)) < EXACT


@pytest.mark.parametrize("engine", ["auto", "tape", "vmap"])
def test_dropout_behind_a_cut_is_the_same_on_both_ways_through_a_part(engine: Any) -> None:
    case = TOPOLOGIES["u-shaped"].fresh()
    for module in case.modules.values():
        module.append(torch.nn.Dropout(0.5)) if isinstance(module, torch.nn.Sequential) else None
    run = run_of(case, plan_of(noise_multiplier=1.0), execution=dpdl.Execution(insecure_seed=11, engine=engine))
    run.run(3)
    assert run.steps_taken == 3


def test_dropout_that_an_engine_draws_in_another_order_is_refused_before_a_step() -> None:
    case = TOPOLOGIES["u-shaped"].fresh()
    case.modules["middle"].append(torch.nn.Dropout(0.5))  # type: ignore[operator]
    run = run_of(case, plan_of(noise_multiplier=1.0), execution=dpdl.Execution(insecure_seed=11, engine="loop"))
    with pytest.raises(EngineMismatchError, match="Part 'middle' gives another output"):
        run.run(1)
    assert run.steps_taken == 0


@every_topology
def test_noise_of_every_party_is_scaled_to_the_norm_of_all_parts_together(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = TOPOLOGIES[name].fresh()
    mechanism = Mechanism().use(monkeypatch)
    plan = plan_of(noise_multiplier=1.5, max_grad_norm=0.6)
    run = run_of(case, plan)
    run.run(2)
    parties = {part.party for part in run.graph.trained}
    assert mechanism.scales == pytest.approx([1.5 * 0.6] * 2 * len(parties))


@every_topology
def test_prediction_is_the_whole_networks(name: str) -> None:
    case = TOPOLOGIES[name].fresh()
    run = run_of(case, plan_of())
    rows = torch.tensor([3, 17, 4])
    found = run.predict(rows=rows)
    again = run.predict(rows=rows[:1])
    assert set(found) == {head.name for head in run.graph.heads}
    for head in run.graph.heads:
        assert len(found[head.name]) == 3
        torch.testing.assert_close(again[head.name], found[head.name][:1])
    if len(found) == 1:
        output = next(iter(found.values()))
        for n, row in enumerate(rows.tolist()):
            columns = {column: tensor[row : row + 1] for column, tensor in case.data.items()}
            own = torch.nn.functional.cross_entropy(output[n : n + 1], columns["y"])
            torch.testing.assert_close(own, case.loss(case.modules, columns), rtol=1e-12, atol=1e-12)
