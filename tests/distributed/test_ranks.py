"""Several processes release what one process would, with one draw of noise; a lost one ends the run clearly."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.stats import chi2
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from dpdl.errors import PrivacyError
from tests.distributed.launch import launch

EXAMPLES, WIDTH, STEPS = 60, 5, 6
SIGMA, CLIP, BATCH = 0.8, 0.5, 12.0


def data() -> TensorDataset:
    rows = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(EXAMPLES, WIDTH, generator=rows), torch.randint(3, (EXAMPLES,), generator=rows))


def plan(**changes: Any) -> dpdl.PrivacyPlan:
    values: dict[str, Any] = {
        "sample_rate": BATCH / EXAMPLES, "expected_batch_size": BATCH, "steps": STEPS, "noise_multiplier": SIGMA,
        "max_grad_norm": CLIP,
    }  # fmt: skip
    return dpdl.PrivacyPlan(**values | changes)


def private_run(the_plan: dpdl.PrivacyPlan, *, model_seed: int = 0, rate: float = 0.5, **execution: Any) -> Any:
    torch.manual_seed(model_seed)
    model = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    loader = DataLoader(data(), batch_size=int(BATCH))
    return dpdl.make_private(model, optimizer, loader, the_plan, execution=dpdl.Execution(**execution))


def train(run: Any, steps: int = STEPS) -> int:
    """Takes steps; returns the number of examples that this process has seen."""
    seen = 0
    while run.optimizer.steps_taken < steps:
        for x, y in run.loader:
            seen += len(x)
            run.optimizer.zero_grad()
            F.cross_entropy(run.model(x), y).backward()
            run.optimizer.step()
            if run.optimizer.steps_taken == steps:
                break
    return seen


def seeded(rank: int, limit: int | None) -> dict[str, Any]:
    run = private_run(plan(), model_seed=rank, insecure_seed=3, max_physical_batch_size=limit)
    seen = train(run)
    return {
        "weights": {name: p.detach().clone() for name, p in run.model.named_parameters()},
        "seen": seen,
        "counted": run.optimizer.diagnostics.examples,
        "epsilon": run.optimizer.epsilon(1e-5),
        "ledger": run.optimizer.ledger.to_json(),
    }


@pytest.mark.parametrize(
    ("ranks", "limit"),
    [(2, 2), pytest.param(3, None, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_several_processes_release_what_one_does(ranks: int, limit: int | None, tmp_path: Path) -> None:
    alone = seeded(0, limit)
    answers = launch(seeded, ranks, tmp_path, limit)
    for answer in answers:
        assert isinstance(answer, dict), answer
        for name, expected in alone["weights"].items():
            torch.testing.assert_close(answer["weights"][name], expected, rtol=0, atol=1e-6)
            assert torch.equal(answer["weights"][name], answers[0]["weights"][name])
        assert answer["counted"] == alone["counted"]
        assert answer["epsilon"] == alone["epsilon"]
        assert answer["ledger"] == alone["ledger"]
    assert sum(answer["seen"] for answer in answers) == alone["seen"]
    assert all(answer["seen"] < alone["seen"] for answer in answers)


def several_things(rank: int) -> tuple[Tensor, str, str, int]:
    """One after another in one group, as starting processes takes seconds."""
    return (
        noise_only(),
        _refusal(lambda: other_plan(rank)),
        _refusal(shard),
        train(private_run(plan(), data_parallel=False)),
    )


def noise_only() -> Tensor:
    """What comes out where every gradient is zero: noise, over expected_batch_size."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 4000, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run = dpdl.make_private(model, optimizer, DataLoader(data(), batch_size=int(BATCH)), plan())
    for x, _ in run.loader:
        before = model.weight.detach().clone()
        (run.model(x) * 0).sum(1).mean().backward()
        run.optimizer.step()
        return (before - model.weight.detach()) * BATCH
    raise AssertionError("the loader is empty")


def other_plan(rank: int) -> None:
    private_run(plan(noise_multiplier=SIGMA + 0.1 * (rank == 1)))


def shard() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    model = nn.Sequential(nn.Linear(WIDTH, 3))
    distribute_module(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    dpdl.make_private(model, optimizer, DataLoader(data(), batch_size=int(BATCH)), plan())


def _refusal(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except PrivacyError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_noise_is_that_of_one_process_and_what_cannot_work_is_refused(ranks: int, tmp_path: Path) -> None:
    answers = launch(several_things, ranks, tmp_path)
    noises, other_plans, shards, alone = zip(*answers, strict=True)
    assert all(torch.equal(noise, noises[0]) for noise in noises)

    def fits(std: float) -> bool:
        below = chi2.cdf(float((noises[0].double() / std).square().sum()), noises[0].numel())
        return bool(1e-4 < below < 1 - 1e-4)

    assert fits(SIGMA * CLIP)
    for wrong in (ranks**0.5, ranks**-0.5, 1.05, 0.95):
        assert not fits(SIGMA * CLIP * wrong)
    assert all("WrapError: Rank 1 was given another plan than rank 0" in text for text in other_plans)
    assert all("ModelError: Parameter 'weight' of module '0'" in text and "fully_shard" in text for text in shards)
    assert min(alone) > 0.7 * STEPS * BATCH  # each took whole batches


def one_dies(rank: int, checkpoint: str) -> None:
    run = private_run(plan())
    train(run, 2)
    if rank == 0:
        dpdl.save_checkpoint(checkpoint, run.model, run.optimizer)
    train(run, 3)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(run, 4)


def resumed(rank: int, checkpoint: str) -> tuple[str, int, list[Tensor]]:
    run = private_run(plan())
    dpdl.load_checkpoint(checkpoint, run.model, run.optimizer)
    train(run)
    return "done", run.optimizer.steps_taken, [p.detach() for p in run.model.parameters()]


def test_a_dead_rank_ends_the_run_and_its_checkpoint_goes_on(tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "run.pt")
    survivor, dead = launch(one_dies, 2, tmp_path, checkpoint)
    assert dead is None
    kind, text, _ = survivor
    assert kind == "ProcessGroupError"
    assert "dpdl.load_checkpoint" in text

    again = tmp_path / "again"
    again.mkdir()
    (_, steps, weights), (_, _, others) = launch(resumed, 2, again, checkpoint)
    assert steps == STEPS
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))
