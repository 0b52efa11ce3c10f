"""The noise of real steps: its scale at every party, and that no draw serves twice."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dpdl
from dpdl.split import party as party_module
from dpdl.split.party import Party
from dpdl.types import ClippedSum, NoisyGradient
from tests.split.core.networks import Case, cases
from tests.split.core.runs import SEED, plan_of, run_of
from tests.split.core.whole_network import parameters

TOPOLOGIES = {case.name: case for case in cases()}
SIGMA, NORM, BATCH = 1.5, 0.6, 6.0


class Released:
    """The noise that each call of the mechanism has added, by party's call, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.noise: list[Tensor] = []
        real = party_module.gaussian_mechanism

        def watched(clipped: ClippedSum, **settings: Any) -> NoisyGradient:
            before = {name: tensor.clone() for name, tensor in clipped.tensors.items()}
            noisy = real(clipped, **settings)
            self.noise.append(torch.cat([(noisy.tensors[n] - t).flatten() for n, t in before.items()]))
            return noisy

        monkeypatch.setattr(party_module, "gaussian_mechanism", watched)


def comes_again(draws: list[Tensor]) -> bool:
    """Whether a tenth of the smallest draw is in others as well, but for rounding."""
    rounded = (torch.cat(draws) * 1e6).round()
    return len(rounded) - len(rounded.unique()) > min(map(len, draws)) / 10


def moved(case: Case, seed: int | None, steps: int, **changes: Any) -> list[Tensor]:
    """How far each party's weights move in each step, times what the sum was divided by."""
    case = case.fresh()
    named = parameters(case)
    run = run_of(case, plan_of(**changes), rate=1.0, execution=dpdl.Execution(insecure_seed=seed))
    found = []
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in named.items()}
        run.step()
        found.append(torch.cat([(before[n] - p.detach()).flatten() for n, p in named.items()]) * BATCH)
    return found


def refuses(values: Tensor, std: float) -> bool:
    """Whether the sum of squares is further from what this std says than chance takes it once in 10^7."""
    n = len(values)
    return abs(float(values.double().square().sum()) / std**2 - n) > 5.4 * math.sqrt(2 * n)


@pytest.mark.parametrize("name", ["vanilla", "u-shaped", "vertical", "chain", "multi-task"])
def test_weights_move_by_noise_of_the_accounted_scale_and_a_wrong_one_is_seen(name: str) -> None:
    empty: dict[str, Any] = {"sample_rate": 1e-6, "expected_batch_size": BATCH, "dataset_size": None}
    case = TOPOLOGIES[name]
    values = torch.cat(moved(case, None, 25, noise_multiplier=SIGMA, max_grad_norm=NORM, **empty))
    assert len(values) > 1000
    assert not refuses(values, SIGMA * NORM)
    parts = len(case.graph(case.modules).trained)
    for wrong in (SIGMA * NORM / math.sqrt(parts), SIGMA, NORM, SIGMA * NORM / BATCH, 1.25 * SIGMA * NORM):
        assert refuses(values, wrong)
    assert abs(float(values.mean())) < 5.4 * SIGMA * NORM / math.sqrt(len(values))


@pytest.mark.parametrize("seed", [None, SEED], ids=["secure", "seeded"])
@pytest.mark.parametrize("name", ["vanilla", "chain", "multi-task"])
def test_no_noise_is_drawn_twice(name: str, seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    released = Released(monkeypatch)
    case = TOPOLOGIES[name].fresh()
    execution = dpdl.Execution(insecure_seed=seed)
    run = run_of(case, plan_of(noise_multiplier=SIGMA), execution=execution)
    run.run(4)
    parties = {part.party for part in run.graph.trained}
    assert len(released.noise) == 4 * len(parties)
    assert not comes_again(released.noise)
    assert comes_again([*released.noise, released.noise[0][5:] + 1e-12])


def test_a_step_that_failed_leaves_its_noise_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    case = TOPOLOGIES["vanilla"].fresh()
    run = run_of(case, plan_of(noise_multiplier=SIGMA))
    positions: list[tuple[str, int]] = []
    real, failed = Party.update, []

    def update(self: Party, client: Any, sums: Any, *, rows: int, position: int) -> None:
        positions.append((self.name, position))
        if self.name == "client" and not failed:
            failed.append(position)
            raise RuntimeError("out of memory")
        real(self, client, sums, rows=rows, position=position)

    monkeypatch.setattr(Party, "update", update)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.step()
    run.step()
    assert positions == [("server", 0), ("client", 0), ("server", 1), ("client", 1)]
    assert run.steps_taken == 2  # the failed one stays spent


def test_two_clients_of_one_server_get_noise_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    released = Released(monkeypatch)
    first = run_of(TOPOLOGIES["vanilla"].fresh(), plan_of(noise_multiplier=SIGMA), client="north")
    case = TOPOLOGIES["vanilla"].fresh()
    graph = case.graph(case.modules)
    bottom = torch.optim.SGD(case.modules["bottom"].parameters(), lr=0.1)
    second = dpdl.split.session.SplitRun(
        graph,
        {"client": bottom},
        case.data,
        plan_of(noise_multiplier=SIGMA),
        client="south",
        servers=first.servers,
        execution=dpdl.Execution(insecure_seed=SEED),
    )
    first.run(2)
    second.run(2)
    assert len(released.noise) == 8
    assert not comes_again(released.noise)


@pytest.mark.parametrize("seed", [None, SEED], ids=["secure", "seeded"])
def test_parties_of_equal_size_get_other_noise(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    released = Released(monkeypatch)
    case = TOPOLOGIES["vanilla"].fresh()
    layers = {"bottom": torch.nn.Linear(4, 4).double(), "top": torch.nn.Linear(4, 4).double()}
    case = replace(case, modules=layers)
    run_of(case, plan_of(noise_multiplier=SIGMA), execution=dpdl.Execution(insecure_seed=seed)).run(3)
    assert {len(draw) for draw in released.noise} == {20}
    assert not comes_again(released.noise)
