"""A model cut by fully_shard trains as in one process: same releases, one draw of noise, slices between steps."""

from __future__ import annotations

import functools
import gc
import os
import pickle
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
from torch.utils.data import DataLoader

import dpdl
from dpdl.errors import PrivacyError
from tests.distributed.launch import launch
from tests.distributed.test_ranks import BATCH, CLIP, SIGMA, STEPS, WIDTH, data, plan

Answer = dict[str, Any]
RATE = 0.05


class Net(nn.Module):
    """Parts that are units of their own, one inside another, tied and frozen weights, and a slice for one rank only."""

    def __init__(self) -> None:
        super().__init__()
        tied = nn.Linear(12, 12)
        self.first = nn.Linear(WIDTH, 12)
        self.block = nn.Sequential(nn.LayerNorm(12), nn.Sequential(nn.Linear(12, 12), nn.Tanh()), tied)
        self.again = nn.Linear(12, 12)
        self.again.weight = tied.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(12, 3)
        self.register_buffer("shift", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.block(torch.relu(self.first(x)))) * self.scale
        out: Tensor = self.last(x) + self.shift
        return out


class Recurrent(nn.Module):
    """Its layer keeps a list of its parameters; they are long enough to be added up as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(WIDTH, 150, batch_first=True)
        self.first = self.last = nn.Linear(150, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.layer(x.unsqueeze(1))[0][:, 0] * self.scale)
        return out


def shard(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    if isinstance(model, Net):
        fully_shard(model.block[1], shard_placement_fn=lambda p: Shard(p.ndim - 1))
        fully_shard([model.first, model.last], reshard_after_forward=False)
    fully_shard(model)


def private_run(
    kind: type[nn.Module] = Net,
    *,
    sharded: bool,
    frozen: bool = True,
    seed: int | None = 3,
    adam: bool = True,
    **execution: Any,
) -> dpdl.Private:
    torch.manual_seed(0)
    model: Any = kind()
    if frozen:
        model.first.weight.requires_grad_(False)
    if sharded:
        shard(model)
    parameters = model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=RATE) if adam else torch.optim.SGD(parameters, lr=RATE, momentum=0.9)
    loader = DataLoader(data(), batch_size=int(BATCH))
    execution_ = dpdl.Execution(insecure_seed=seed, **execution)
    return dpdl.make_private(model, optimizer, loader, plan(), execution=execution_)


def train(run: dpdl.Private, steps: int = STEPS, *, first: Callable[[], object] = lambda: None) -> None:
    """Takes steps; does `first` when a batch is handed out."""
    while run.optimizer.steps_taken < steps:
        for x, y in run.loader:
            first()
            run.optimizer.zero_grad()
            F.cross_entropy(run.model(x), y).backward()
            run.optimizer.step()
            if run.optimizer.steps_taken == steps:
                break


def weights(run: dpdl.Private) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def is_sharded(run: dpdl.Private) -> bool:
    return all(hasattr(p, "device_mesh") for p in run.model.parameters())


# ── what is released ────────────────────────────────────────────────────────────────────────────────


def several_runs(rank: int, sharded: bool) -> Answer:
    """By each engine, in parts, with a parameter frozen, and one more on the way, unfrozen after a batch was out."""
    found: Answer = {}
    ways = ((Net, "auto", None, True), (Net, "vmap", 2, False), (Net, "loop", 3, True), (Recurrent, "tape", 2, False))
    for kind, engine, limit, adam in ways:
        run = private_run(kind, sharded=sharded, engine=engine, max_physical_batch_size=limit, adam=adam)
        train(run, 3)
        run.model.last.weight.requires_grad_(False)
        train(run, 5)
        train(run, first=functools.partial(run.model.last.weight.requires_grad_, True))
        assert is_sharded(run) == sharded
        with torch.no_grad():
            outputs = run.model.eval()(data().tensors[0])
        found[engine] = {
            **weights(run),
            "outputs": outputs,
            "engine": run.model.engine_name,
            "epsilon": run.optimizer.epsilon(1e-5),
            "examples": run.optimizer.diagnostics.examples,
            "ledger": run.optimizer.ledger.to_json(),
        }
    return found


# ── several things in one group, as starting processes takes seconds ────────────────────────────────


def several_things(rank: int, folder: str) -> Answer:
    found: Answer = {
        "runs": several_runs(rank, True),
        "noise": noise_only(),
        "numbers": [numbers_between_steps(sharded=sharded) for sharded in (False, True)],
        "refused": refusals(rank),
        "saved": saved_and_resumed(Path(folder)),
    }
    (Path(folder) / f"rank{rank}").write_bytes(pickle.dumps(found))  # as the last rank will not return
    return {**found, "lost": refusal(lambda: one_dies(Path(folder), rank))}


def noise_only() -> Tensor:
    """What comes out where every gradient is zero: noise, over expected_batch_size."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 14001, bias=False)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run = dpdl.make_private(model, optimizer, DataLoader(data(), batch_size=int(BATCH)), plan())
    for x, _ in run.loader:
        before = weights(run)["weight"]
        (run.model(x) * 0).sum(1).mean().backward()
        run.optimizer.step()
        return (before - weights(run)["weight"]) * BATCH
    raise AssertionError("the loader is empty")


def numbers_between_steps(*, sharded: bool) -> Any:
    """Numbers in memory that a run adds, after a step: weights and Adam's state, whole or in slices."""
    from torch.distributed.fsdp import fully_shard

    def in_memory() -> Any:
        gc.collect()
        tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
        plain = [tensor.to_local() if hasattr(tensor, "device_mesh") else tensor for tensor in tensors]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}.values()) // 4

    before = in_memory()
    model = Recurrent()
    if sharded:
        fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters())
    run = dpdl.make_private(model, optimizer, DataLoader(data(), batch_size=int(BATCH)), plan())
    train(run, 2)
    run.optimizer.zero_grad()
    return in_memory() - before


def refusal(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except PrivacyError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def refusals(rank: int) -> dict[str, str]:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    def make(prepare: Callable[[nn.Sequential], object], **more: Any) -> dpdl.Private:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, 3))
        prepare(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return dpdl.make_private(model, optimizer, DataLoader(data(), batch_size=int(BATCH)), plan(), **more)

    def by_columns(_: str, part: nn.Module, where: DeviceMesh) -> None:
        for name, p in list(part.named_parameters(recurse=False)):
            part.register_parameter(name, nn.Parameter(distribute_tensor(p, where, [Shard(0)])))

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    found = {
        "policy": refusal(lambda: make(lambda m: fully_shard(m, mp_policy=MixedPrecisionPolicy(torch.bfloat16)))),
        "tensor parallel": refusal(lambda: make(lambda m: distribute_module(m, mesh, by_columns))),
        "replicas": refusal(
            lambda: make(lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (size, 1), mesh_dim_names=("a", "b"))))
        ),
        "not all": refusal(lambda: make(lambda m: fully_shard(m[0]))),
        "alone": refusal(lambda: make(fully_shard, execution=dpdl.Execution(data_parallel=False))),
        "watchdog": refusal(lambda: make(fully_shard, watchdog=dpdl_watchdog())),
        "one is not": refusal(lambda: make(fully_shard if rank == 0 else lambda m: None)),
    }
    run = make(fully_shard, execution=dpdl.Execution(self_check=False))

    def evaluate_alone() -> None:
        with torch.no_grad():
            _ = run.model(data().tensors[0]) if rank == 0 else weights(run)

    found["evaluated on one"] = refusal(evaluate_alone)

    def native() -> None:
        x, y = next(iter(run.loader))
        F.cross_entropy(run.model(x), y).backward()
        F.cross_entropy(run.model.module(x), y).backward()
        run.optimizer.step()

    found["plain module"] = refusal(native)
    run.optimizer.zero_grad()

    def load_in_between() -> None:
        x, _ = next(iter(run.loader))
        run.model.load_state_dict(run.model.state_dict())
        run.model(x)

    found["loaded in between"] = refusal(load_in_between)

    def scaled() -> None:
        x, y = next(iter(run.loader))
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(F.cross_entropy(run.model(x), y)).backward()
        scaler.step(run.optimizer)

    found["scaler"] = refusal(scaled)
    assert run.optimizer.steps_taken == 0
    with torch.no_grad():
        run.model.module(data().tensors[0])  # as FSDP2 runs it, which leaves the root's weights together
    train(run, 1)
    assert is_sharded(run)
    return found


def dpdl_watchdog() -> Any:
    from dpdl.watchdog import Watchdog

    return Watchdog(delta=1e-5, save_to="never.pt")


def saved_and_resumed(folder: Path) -> Answer:
    """Half a run from slices, the rest from slices again; all ranks write one file."""
    run = private_run(sharded=True)
    train(run, 3)
    dpdl.save_checkpoint(folder / "saved.pt", run.model, run.optimizer)
    run = private_run(sharded=True)
    with torch.no_grad():
        run.model.scale.add_(1.0)
    dpdl.load_checkpoint(folder / "saved.pt", run.model, run.optimizer)
    train(run)
    return {"resumed": weights(run), "steps": run.optimizer.steps_taken}


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Answer], Path]:
    folder = tmp_path_factory.mktemp("ranks")
    found = launch(several_things, request.param, folder, str(folder))
    assert isinstance(found[0], dict), found[0]
    return found, folder


def test_ranks_with_slices_release_what_one_process_does(answers: tuple[list[Answer], Path]) -> None:
    alone = several_runs(0, False)
    assert alone["auto"]["engine"] == "tape"
    for answer in answers[0]:
        assert answer["runs"].keys() == alone.keys()
        for engine, expected in alone.items():
            found = answer["runs"][engine]
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                if isinstance(value, Tensor):
                    torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5)
                    assert torch.equal(found[name], answers[0][0]["runs"][engine][name])
                else:
                    assert found[name] == value


def test_noise_is_that_of_one_process(answers: tuple[list[Answer], Path]) -> None:
    first = answers[0][0]["noise"]
    assert all(torch.equal(answer["noise"], first) for answer in answers[0])

    def fits(noise: Tensor, std: float) -> bool:
        below = chi2.cdf(float((noise.double() / std).square().sum()), noise.numel())
        return bool(1e-4 < below < 1 - 1e-4)

    half = len(first) // 2
    for noise in (first, first[: half + 1], first[half + 1 :]):
        assert fits(noise, SIGMA * CLIP)
        for wrong in (2**0.5, 2**-0.5, 1.05, 0.95):
            assert not fits(noise, SIGMA * CLIP * wrong)
    assert not torch.equal(first[:half], first[-half:])  # no two slices have the same


def test_between_steps_a_rank_holds_slices(answers: tuple[list[Answer], Path]) -> None:
    model = sum(p.numel() for p in Recurrent().parameters())
    for answer in answers[0]:
        whole, sliced = answer["numbers"]
        assert whole > 3 * model - 1000  # the weights, and two of Adam's for each
        assert sliced < (1 / len(answers[0]) + 0.05) * whole


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("policy", "ModelError", "mixed-precision policy"),
        ("tensor parallel", "ModelError", "in another way than by fully_shard"),
        ("replicas", "ModelError", "in another way than by fully_shard"),
        ("not all", "WrapError", "parameter '1.weight', which is not sharded"),
        ("alone", "ModelError", "data_parallel=True"),
        ("watchdog", "WrapError", "save_checkpoint on all ranks"),
        ("one is not", "WrapError", "another model"),
        ("plain module", "StepError", "did not come from the private model"),
        (
            "evaluated on one",
            "StepError",
            "Rank 1 is at collecting the weights, rank 0 at putting the weights together",
        ),
        ("loaded in between", "StepError", "written to after the private loader"),
        ("scaler", "StepError", "GradScaler"),
    ],
)
def test_what_cannot_work_is_refused_on_all_ranks(
    what: str, kind: str, words: str, answers: tuple[list[Answer], Path]
) -> None:
    for answer in answers[0]:
        assert answer["refused"][what].startswith(kind), answer["refused"][what]
        assert words in answer["refused"][what]


def test_a_checkpoint_is_whole_and_goes_on_here_or_there(answers: tuple[list[Answer], Path]) -> None:
    found, folder = answers
    unbroken = private_run(sharded=False)
    train(unbroken)
    alone = private_run(sharded=False)
    expected = {name: value.shape for name, value in alone.model.state_dict().items()}
    saved = torch.load(folder / "saved.pt", weights_only=True)
    assert {name: value.shape for name, value in saved["model"].items()} == expected
    assert all(type(value) is Tensor for value in saved["model"].values())
    for answer in found:
        assert answer["saved"]["steps"] == STEPS
        for name, value in unbroken.model.state_dict().items():
            torch.testing.assert_close(answer["saved"]["resumed"][name], value, rtol=0, atol=2e-5)
    dpdl.load_checkpoint(folder / "saved.pt", alone.model, alone.optimizer)
    train(alone)
    for name, value in unbroken.model.state_dict().items():
        torch.testing.assert_close(alone.model.state_dict()[name], value, rtol=0, atol=2e-5)


# ── a lost rank ─────────────────────────────────────────────────────────────────────────────────────


def one_dies(folder: Path, rank: int) -> None:
    """The last rank does, while others wait for its weights (of three) or for its sums."""
    ranks = dist.get_world_size()
    run = private_run(sharded=True, seed=None)
    train(run, 2)
    dpdl.save_checkpoint(folder / f"run{rank}.pt", run.model, run.optimizer)
    if rank == ranks - 1 and ranks == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    for x, y in run.loader:
        F.cross_entropy(run.model(x), y).backward()
        if rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        run.optimizer.step()


def test_a_dead_rank_ends_the_run_and_its_checkpoint_goes_on(answers: tuple[list[Answer], Path]) -> None:
    found, folder = answers
    assert "lost" not in found[-1]
    for answer in found[:-1]:
        assert answer["lost"].startswith("ProcessGroupError")
        assert "dpdl.load_checkpoint" in answer["lost"]
    run = private_run(sharded=False, seed=None)
    dpdl.load_checkpoint(folder / "run0.pt", run.model, run.optimizer)
    assert run.optimizer.steps_taken == 2
    train(run)
    assert run.optimizer.steps_taken == STEPS
