"""What a run claims and may still do after its process has ended: never less, and never more, than the ledger knows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dpdl
from accountants import Gaussian, NeighboringRelation, PoissonSampled, PRVAccountant
from dpdl.errors import CheckpointError, ModelError, PlanExhaustedError, PrivacyError, WrapError
from dpdl.ledger import Ledger
from dpdl.secure_random import RandomStream
from dpdl.split.cut_release import CutRelease
from dpdl.split.door import ReleaseDoor
from dpdl.split.part_training import PartTraining
from dpdl.split.session import SplitRun
from tests.split.core.networks import Case, cases
from tests.split.core.runs import plan_of, run_of
from tests.split.core.whole_network import parameters

TOPOLOGIES = {case.name: case for case in cases()}
DELTA = 1e-5
SECURE = dpdl.Execution()


def secure_run(name: str = "vanilla", *, steps: int = 50, **more: Any) -> tuple[Case, SplitRun]:
    case = TOPOLOGIES[name].fresh()
    return case, run_of(case, plan_of(noise_multiplier=1.0, steps=steps), execution=SECURE, **more)


def consumers(run: SplitRun) -> float:
    found = run.report(DELTA).against("model consumers")[0].epsilon
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["vanilla", "vanilla, labels with the server", "chain, labels with the first"])
@pytest.mark.parametrize("with_state", [True, False])
def test_a_run_that_goes_on_in_a_new_process_claims_and_counts_all_steps(
    name: str, with_state: bool, tmp_path: Path
) -> None:
    states: dict[str, Any] | None = None
    weights: dict[str, Tensor] = {}
    for number in (1, 2, 3):
        with dpdl.LedgerFile(tmp_path / "data.ledger") as ledger:
            _, run = secure_run(name, ledger=ledger, steps=25)
            if states is not None and with_state:
                run.client.load_state_dict(states)
            elif weights:
                run.client.party.load_weights(weights)
            assert run.steps_taken == 10 * (number - 1)
            if number == 3:
                with pytest.raises(PlanExhaustedError, match="5 left"):
                    run.run(10)
            taken = min(10, 25 - run.steps_taken)
            run.run(taken)
            states, weights = run.client.state_dict(), run.client.party.weights()
            steps = 10 * (number - 1) + taken
            expected = PRVAccountant().compose(PoissonSampled(0.1, Gaussian(1.0)) * steps).epsilon(DELTA)
            assert ledger.releases == steps
            assert consumers(run) >= ledger.epsilon(DELTA) * (1 - 1e-9)
            assert consumers(run) == pytest.approx(expected, rel=1e-6)
            assert run.epsilon(DELTA) == pytest.approx(expected, rel=1e-6)
            told = "weights that were loaded" in " ".join(run.report(DELTA).not_covered)
            assert told == (number > 1 and not with_state)
    with dpdl.LedgerFile(tmp_path / "data.ledger") as ledger:
        _, run = secure_run(name, ledger=ledger, steps=25)
        with pytest.raises(PlanExhaustedError):
            run.step()


def test_what_others_have_spent_on_the_same_data_is_in_the_claim_and_not_in_the_plan(tmp_path: Path) -> None:
    with dpdl.LedgerFile(tmp_path / "data.ledger") as ledger:
        ledger.record(Gaussian(2.0), label="mean", run="a statistic")
        _, other = secure_run(ledger=ledger, client="another training")
        other.run(3)
        _, run = secure_run(ledger=ledger)
        assert run.steps_taken == 0
        run.run(2)
        alone = PRVAccountant().compose(PoissonSampled(0.1, Gaussian(1.0)) * 2).epsilon(DELTA)
        assert consumers(run) >= ledger.epsilon(DELTA) * (1 - 1e-9) > 1.5 * alone


@pytest.mark.parametrize("name", ["vanilla, labels with the server", "vertical"])
def test_a_party_whose_records_another_one_draws_claims_nothing_for_the_drawing(name: str) -> None:
    case = TOPOLOGIES[name]
    run = run_of(case.fresh(), plan_of(noise_multiplier=2.0))
    run.run(3)
    plain = PRVAccountant().compose(Gaussian(2.0) * 3).epsilon(DELTA)
    for party, server in run.servers.items():
        (claim,) = server.report(DELTA, client=run.client.name).against("model consumers")
        assert claim.epsilon is not None
        if server.party.columns is None:
            assert claim.epsilon < plain / 2
            assert "Poisson sampling" in " ".join(claim.assumes)
        else:
            assert claim.epsilon >= plain * (1 - 1e-6), party
            assert "Poisson" not in str(claim)
    assert "Poisson" not in str(run.report(DELTA).against("model consumers")[0].assumes)


def test_a_server_without_records_names_who_samples() -> None:
    run = run_of(TOPOLOGIES["vanilla"].fresh(), plan_of(noise_multiplier=2.0))
    run.run(1)
    (claim,) = run.servers["server"].report(DELTA).against("model consumers")
    assert any("'client' draws each batch by Poisson sampling" in word for word in claim.assumes)


def with_a_door() -> tuple[SplitRun, ReleaseDoor]:
    case = TOPOLOGIES["vanilla, labels with the server"].fresh()
    plan = plan_of(noise_multiplier=2.0)
    door = ReleaseDoor(
        activations=CutRelease(max_norm=1.0, noise_multiplier=8.0),
        training=PartTraining.private(noise_multiplier=2.0 * 2**0.5),
        ledger=Ledger(relation=NeighboringRelation.REPLACE_ONE),
        stream=RandomStream.from_os(),
    )
    return run_of(case, plan, release={"client": door}, execution=SECURE), door


def test_a_resumed_party_remembers_what_its_door_released() -> None:
    run, _ = with_a_door()
    run.run(6)
    (before,) = run.report(DELTA).against("server")
    state = copy.deepcopy(run.client.state_dict())
    again, _ = with_a_door()
    again.client.load_state_dict(state)
    again.run(1)
    (after,) = again.report(DELTA).against("server")
    assert before.epsilon is not None
    assert after.epsilon is not None
    assert after.epsilon > before.epsilon > 0
    plain = run_of(TOPOLOGIES["vanilla, labels with the server"].fresh(), plan_of(noise_multiplier=2.0))
    with pytest.raises(CheckpointError):
        plain.client.load_state_dict(state)


def damaged(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    name, tensor = next(iter(state["weights"].items()))
    run = next(iter(state["clients"]))
    return {
        "empty": {},
        "no weights": {key: value for key, value in state.items() if key != "weights"},
        "an optimizer of another kind": {**state, "optimizer": {"a": 1}},
        "an optimizer of more parameters": {
            **state,
            "optimizer": {**state["optimizer"], "param_groups": state["optimizer"]["param_groups"] * 2},
        },
        "no optimizer": {**state, "optimizer": None},
        "weights of another shape": {**state, "weights": {**state["weights"], name: tensor[:1]}},
        "weights that are none": {**state, "weights": {**state["weights"], name: 3}},
        "clients that are none": {**state, "clients": 3},
        "a client that is none": {**state, "clients": {run: 3}},
        "no ledger": {**state, "clients": {run: {k: v for k, v in state["clients"][run].items() if k != "ledger"}}},
        "a door": {**state, "outlet": {"schema": "something"}},
    }


@pytest.mark.parametrize("kind", list(damaged({"weights": {"a": torch.zeros(2)}, "clients": {"c": {}}, "optimizer": {
    "param_groups": []}})))  # fmt: skip
def test_a_state_that_is_refused_changes_nothing(kind: str) -> None:
    _, run = secure_run()
    run.run(2)
    state = damaged(run.client.state_dict())[kind]
    again, other = secure_run()
    other.run(1)
    before = {name: p.detach().clone() for name, p in parameters(again).items()}
    key, session, saved = other.client._run.branch, other.client.session, other.client.state_dict()
    with pytest.raises((CheckpointError, ModelError)):
        other.client.load_state_dict(state)
    assert other.steps_taken == 1
    assert (other.client._run.branch, other.client.session) == (key, session)
    assert other.client.state_dict()["optimizer"] == saved["optimizer"]
    assert all(torch.equal(before[name], p) for name, p in parameters(again).items())
    other.run(1)


def test_a_module_trains_in_one_private_run_of_any_kind() -> None:
    case, kept_run = secure_run()
    part = case.modules["bottom"]
    data = torch.utils.data.TensorDataset(case.data["x"], case.data["y"])
    loader = torch.utils.data.DataLoader(data, batch_size=6)
    with pytest.raises(WrapError, match="private run already"):
        dpdl.make_private(part, torch.optim.SGD(part.parameters(), lr=0.1), loader, plan_of(noise_multiplier=1.0))
    other = TOPOLOGIES["vanilla"].fresh()
    module = other.modules["bottom"]
    kept = dpdl.make_private(
        module, torch.optim.SGD(module.parameters(), lr=0.1), loader, plan_of(noise_multiplier=1.0)
    )
    with pytest.raises(PrivacyError):
        run_of(other, plan_of(noise_multiplier=1.0))
    assert kept
    assert kept_run.steps_taken == 0
